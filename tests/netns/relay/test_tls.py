"""TLS on either side of the relay, with OpenSSL's own client and curl among the peers."""

from __future__ import annotations

import collections
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, client_context, server_context
from tests.netns.relay.net import HOST4, PEER4, Net
from tests.netns.relay.test_listeners import configured, serving
from tpctl.relay.connections.proxy_protocol import Header, build
from tpctl.relay.loop.original_destination import Destination

pytestmark = pytest.mark.root
BULK = 3 * 1024 * 1024 + 321


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with relay_net.public_directory() as directory:
        yield Pki(directory)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """What the relay reads again when it runs as its user."""
    with relay_net.public_directory() as directory:
        yield directory


def terminating(pki: Pki, more: str = "", server: tuple[Path, Path] | None = None) -> str:
    certificate, key = server or pki.server
    return f"""
listeners:
  - listen: "*:1443 ssl"
    direction: inbound
    upstream: 127.0.0.1:8080
    ssl: {{certificate: {certificate}, certificate_key: {key}{more}}}
"""


@contextlib.contextmanager
def tls_client(net: Net, context: ssl.SSLContext, name: str = "server.test") -> Iterator[ssl.SSLSocket]:
    with net.connect(net.peer, (HOST4, 1443)) as plain, context.wrap_socket(plain, server_hostname=name) as client:
        yield client


def test_clients_speak_tls_and_the_application_does_not(net: Net, tmp_path: Path, pki: Pki) -> None:
    sent = relay_net.pattern(BULK)
    with (
        configured(net, tmp_path, terminating(pki)) as running,
        serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo),
        tls_client(net, client_context(pki)) as client,
    ):
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        received = b""
        while len(received) < BULK:
            received += client.recv(65536)
        sender.join()
        assert received == sent
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        client.unwrap()  # says goodbye, and waits for the relay's
        client.close()
        line = running.wait_for("connection")
    assert (line["sent"], line["received"], line["reason"]) == (BULK + 1, BULK + 1, "closed")


def test_one_side_may_say_goodbye_before_the_other(net: Net, tmp_path: Path, pki: Pki) -> None:
    """The application answers when its client has ended; and a client goes on when the application has ended."""

    def finish_first(client: socket.socket, _peer: object) -> None:
        client.sendall(b"bye")
        client.shutdown(socket.SHUT_WR)
        late.append(relay_net.read_all(client))

    late: list[bytes] = []
    with configured(net, tmp_path, terminating(pki)):
        with serving(net, net.host, ("127.0.0.1", 8080), relay_net.digest_service(BULK)):
            sent = relay_net.pattern(BULK)
            answer = half_closing_exchange(net, pki, sent)
            assert answer[32:] == sent
        with serving(net, net.host, ("127.0.0.1", 8080), finish_first), tls_client(net, client_context(pki)) as client:
            assert client.recv(10) == b"bye"
            assert client.recv(10) == b""
            client.sendall(b"still here")
            client.unwrap()
            relay_net.until(lambda: late)
    assert late == [b"still here"]


def half_closing_exchange(net: Net, pki: Pki, data: bytes) -> bytes:
    """Send, say goodbye, and read the answer: the socket module cannot, OpenSSL on memory can."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secure = client_context(pki).wrap_bio(incoming, outgoing, server_hostname="server.test")
    answer = b""
    with net.connect(net.peer, (HOST4, 1443)) as plain:

        def until(step: Callable[[], object]) -> object:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    plain.sendall(outgoing.read())
                    incoming.write(plain.recv(65536))

        until(secure.do_handshake)
        for start in range(0, len(data), 16384):
            secure.write(data[start : start + 16384])
            plain.sendall(outgoing.read())
        with contextlib.suppress(ssl.SSLWantReadError):
            secure.unwrap()
        plain.sendall(outgoing.read())
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while True:
                more = until(lambda: secure.read(65536))
                assert isinstance(more, bytes)
                answer += more
    return answer


def test_a_stream_that_is_cut_off_is_not_taken_for_complete(net: Net, tmp_path: Path, pki: Pki) -> None:
    ended: list[str] = []

    def serve(client: socket.socket, _peer: object) -> None:
        try:
            ended.append(repr(relay_net.read_all(client)))
        except ConnectionResetError:
            ended.append("reset")

    with (
        configured(net, tmp_path, terminating(pki)) as running,
        serving(net, net.host, ("127.0.0.1", 8080), serve),
        tls_client(net, client_context(pki)) as client,
    ):
        client.sendall(b"half a mess")
        time.sleep(0.2)
        socket.socket.shutdown(client, socket.SHUT_WR)  # below TLS
        line = running.wait_for("connection")
        assert (line["reason"], line["error"]) == ("reset by the client", "UNEXPECTED_EOF_WHILE_READING")
        relay_net.until(lambda: ended)
    assert ended == ["reset"]


def test_curl_and_openssl_are_content(net: Net, tmp_path: Path, pki: Pki) -> None:
    def web(client: socket.socket, _peer: object) -> None:
        client.recv(4096)
        client.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}")
    with (
        configured(net, tmp_path, terminating(pki)),
        serving(net, net.host, ("127.0.0.1", 8080), web),
    ):
        curl = ("curl", "-sS", "--cacert", str(pki.root.path), f"https://{HOST4}:1443/")
        assert relay_net.run(*on_peer, *curl) == "hello"
        client = ("openssl", "s_client", "-connect", f"{HOST4}:1443", "-CAfile", str(pki.root.path),
                  "-verify_return_error", "-verify_hostname", "server.test", "-quiet", "-ign_eof")  # fmt: skip
        assert relay_net.run(*on_peer, *client, stdin="GET / HTTP/1.0\n\n").endswith("hello")


def is_admitted(net: Net, context: ssl.SSLContext) -> bool:
    try:
        with tls_client(net, context) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except OSError:
        return False


def test_clients_must_show_a_certificate_where_that_is_asked(net: Net, tmp_path: Path, pki: Pki) -> None:
    good, none = client_context(pki, pki.client), client_context(pki)
    foreign = client_context(pki, pki.other.issue("foreign"))
    deep = client_context(pki, pki.deep.issue("deep-client"))
    with serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo):
        for more, expected in (
            (f", client_ca_file: {pki.root.path}", [True, False, False, False]),
            (f", client_ca_file: {pki.root.path}, verify_client: optional", [True, True, False, False]),
            (f", client_ca_file: {pki.root.path}, tls_verify_depth: 2", [True, False, False, True]),
            (f", client_ca_file: {pki.root.path}, tls_verify_depth: 0", [False, False, False, False]),
        ):
            with configured(net, tmp_path, terminating(pki, more)) as running:
                assert [is_admitted(net, context) for context in (good, none, foreign, deep)] == expected, more
                if not all(expected):
                    running.wait_for("refused: the TLS handshake failed")


def test_plain_words_and_silence_are_no_handshake(net: Net, tmp_path: Path, pki: Pki) -> None:
    text = "timeouts: {handshake: 500ms}\n" + terminating(pki)
    with configured(net, tmp_path, text) as running:
        with net.connect(net.peer, (HOST4, 1443)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                relay_net.read_all(client)
        running.wait_for("refused: the TLS handshake failed")
        with net.connect(net.peer, (HOST4, 1443)) as client, pytest.raises(ConnectionResetError):
            relay_net.read_all(client)
        running.wait_for("refused: the PROXY protocol header or TLS handshake did not come in time")


def test_tls_on_both_sides_with_proxy_protocol_before_each(net: Net, tmp_path: Path, pki: Pki) -> None:
    certificate, key = pki.server
    text = f"""
listeners:
  - listen: "*:1443 ssl proxy_protocol"
    direction: inbound
    upstream: {PEER4}:8443
    trusted_ips: [{PEER4}]
    send_proxy_protocol: v2
    ssl: {{certificate: {certificate}, certificate_key: {key}}}
    upstream_tls: {{ca_file: {pki.root.path}}}
"""
    header = build(Header(2, source=Destination("203.0.113.9", 4), destination=Destination("203.0.113.80", 443)))
    context = server_context(pki.server)
    heard: list[bytes] = []

    def serve(client: socket.socket, _peer: object) -> None:
        heard.append(client.recv(len(header)))
        with context.wrap_socket(client, server_side=True) as secure:
            relay_net.echo(secure, None)

    with (
        configured(net, tmp_path, text) as running,
        serving(net, net.peer, (PEER4, 8443), serve),
        net.connect(net.peer, (HOST4, 1443)) as plain,
    ):
        plain.sendall(header)
        with client_context(pki).wrap_socket(plain, server_hostname="server.test") as client:
            client.sendall(b"through both")
            assert client.recv(100) == b"through both"
        assert running.wait_for("connection")["client"] == "203.0.113.9"
    assert heard == [header]


END = "-----END CERTIFICATE-----\n"


def reloads(running: relay_net.Relay) -> int:
    return [line["event"] for line in running.lines()].count("the configuration was reloaded")


@pytest.mark.parametrize("workers", [1, 2])
def test_certificates_are_rotated_under_load(net: Net, tmp_path: Path, pki: Pki, workers: int) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    pairs = [pki.middle.issue(f"rotated{number}", "DNS:server.test") for number in range(4)]
    key.touch()
    relay_net.for_the_relay(key)

    def install(number: int) -> None:
        certificate.write_bytes(pairs[number][0].read_bytes())
        key.write_bytes(pairs[number][1].read_bytes())

    results: collections.Counter[str] = collections.Counter()
    shown: collections.Counter[bytes] = collections.Counter()
    certificates = [ssl.PEM_cert_to_DER_cert(one.read_text().partition("-----END")[0] + END) for one, _ in pairs]
    over = threading.Event()

    def load() -> None:
        context = client_context(pki)
        with net.inside(net.peer):
            while not over.is_set():
                try:
                    with (
                        socket.create_connection((HOST4, 1443), timeout=30) as plain,
                        context.wrap_socket(plain, server_hostname="server.test") as client,
                    ):
                        client.sendall(b"hello")
                        results["right" if client.recv(5) == b"hello" else "wrong"] += 1
                        shown[client.getpeercert(binary_form=True) or b""] += 1
                except OSError as error:
                    results[type(error).__name__] += 1

    install(0)
    text = f"workers: {workers}\n" + terminating(pki, server=(certificate, key))
    with (
        configured(net, tmp_path, text) as running,
        serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo),
        tls_client(net, client_context(pki)) as lasting,
    ):
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            rotation = 0
            while rotation < 12 or results.total() < 50:
                rotation += 1
                number = rotation % len(pairs)
                before = shown[certificates[number]]
                install(number)
                running.process.send_signal(signal.SIGHUP)
                relay_net.until(lambda: reloads(running) == rotation)  # noqa: B023 - asked at once
                # Not before may the files change again.
                relay_net.until(lambda: shown[certificates[number]] > before)  # noqa: B023
            key.write_text("no key at all")
            running.process.send_signal(signal.SIGHUP)
            problems = running.wait_for("the configuration is invalid")["problems"]
        finally:
            over.set()
            for thread in threads:
                thread.join()
        lasting.sendall(b"still")
        assert lasting.recv(5) == b"still"
    assert results.keys() == {"right"}, results
    assert set(shown) == set(certificates)
    assert "are not a certificate and its key in PEM" in problems[0]


def test_files_that_cannot_be_used_are_all_named(net: Net, tmp_path: Path, pki: Pki) -> None:
    text = f"""
listeners:
  - listen: "*:1443 ssl"
    direction: inbound
    ssl: {{certificate: {pki.server[0]}, certificate_key: {pki.client[1]}, client_ca_file: /nonexistent.pem}}
    upstream_tls: {{ca_file: {pki.client[1]}, server_name: ".", certificate: /a.pem, certificate_key: /b.pem}}
"""
    (tmp_path / "relay.yaml").write_text(text)
    running = relay_net.Relay(net, tmp_path, "--config", str(tmp_path / "relay.yaml"), "--check-config")
    assert running.exit_code() == 2
    places = [line.split(": ")[2] for line in running.log_text().splitlines() if line.startswith("error: ")]
    assert places == [
        "ssl.certificate", "ssl.client_ca_file", "upstream_tls.server_name", "upstream_tls.ca_file",
        "upstream_tls.certificate", "upstream_tls.certificate_key",
    ]  # fmt: skip
