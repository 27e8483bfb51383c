"""The PROXY protocol on real connections: HAProxy in front of the relay and behind it, and clients nobody trusts."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, Net
from tests.netns.relay.test_listeners import configured, serving
from tpctl.relay.connections.proxy_protocol import Header, Tlv, build
from tpctl.relay.loop.original_destination import Destination

pytestmark = [pytest.mark.root, pytest.mark.skipif(not shutil.which("haproxy"), reason="HAProxy is not installed")]
CLIENT, FRONT = Destination("203.0.113.9", 40000), Destination("203.0.113.80", 443)
HTTP = b"GET / HTTP/1.0\r\n\r\n"
COMMON = """
global
    maxconn 100
defaults
    timeout connect 30s
    timeout client 30s
    timeout server 30s
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@contextlib.contextmanager
def haproxy(net: Net, name: str, directory: Path, port: int, text: str) -> Iterator[None]:
    """A HAProxy in a namespace, which serves a port on loopback."""
    path = directory / f"haproxy-{port}.cfg"
    path.write_text(COMMON + text)

    def listens() -> bool:
        with contextlib.suppress(OSError), net.connect(name, ("127.0.0.1", port)):
            return True
        return False

    process = subprocess.Popen(["nsenter", f"--net=/run/netns/{name}", "haproxy", "-db", "-q", "-f", str(path)])
    try:
        relay_net.until(listens)
        yield
    finally:
        process.terminate()
        process.wait(relay_net.PATIENCE)


RECEIVER = """
frontend f
    mode http
    bind 127.0.0.1:8080 accept-proxy
    bind 127.0.0.1:8079
    http-request return status 200 content-type text/plain lf-string "%[src]|%[dst]|%[dst_port]|%[fc_pp_unique_id]\\n"
"""
SENDER = """
listen f
    mode tcp
    bind 127.0.0.1:{port}
    unique-id-format of-%ci
    server relay {relay} send-proxy{options}
"""


@pytest.mark.parametrize("sent", ["", "-v2", "-v2 proxy-v2-options crc32c,unique-id"])
@pytest.mark.parametrize("passed_on", ["v1", "v2"])
def test_haproxy_on_both_sides(net: Net, tmp_path: Path, sent: str, passed_on: str) -> None:
    text = f"""
listeners:
  - listen: "*:15006 proxy_protocol"
    direction: inbound
    upstream: 127.0.0.1:8080
    trusted_ips: [{PEER4}]
    send_proxy_protocol: {passed_on}
"""
    sender = SENDER.format(port=9000, relay=f"{HOST4}:15006", options=sent)
    with (
        configured(net, tmp_path, text) as running,
        haproxy(net, net.host, tmp_path, 8079, RECEIVER),
        haproxy(net, net.peer, tmp_path, 9000, sender),
        net.connect(net.peer, ("127.0.0.1", 9000), "127.0.0.55") as client,
    ):
        client.sendall(HTTP)
        answer = relay_net.read_all(client).decode().splitlines()[-1]
        client.close()
        line = running.wait_for("connection", client="127.0.0.55")
    unique = "of-127.0.0.55" if "unique-id" in sent and passed_on == "v2" else ""
    assert answer == f"127.0.0.55|127.0.0.1|9000|{unique}"
    assert line["reason"] == "closed"


def test_haproxys_health_checks_speak_for_themselves(net: Net, tmp_path: Path) -> None:
    """They come with the command LOCAL, and end with a reset: the connection is the proxy's own."""
    text = LISTENER.format(listen="*:15006", trusted=PEER4, handshake="1m")
    check = SENDER.format(port=9001, relay=f"{HOST4}:15006", options="-v2 check check-send-proxy inter 100ms")
    with (
        configured(net, tmp_path, text) as running,
        serving(net, net.host, ("127.0.0.1", 8082), raw),
        haproxy(net, net.peer, tmp_path, 9001, check),
    ):
        running.wait_for("connection", client=PEER4, destination=f"{HOST4}:15006", reason="reset by the client")
        with net.connect(net.peer, (HOST4, 15006)) as client:
            client.sendall(build(Header(2, local=True)))
            client.shutdown(socket.SHUT_WR)
            assert relay_net.read_all(client) == build(Header(2, local=True))


LISTENER = """
timeouts: {{handshake: {handshake}}}
listeners:
  - {{listen: "{listen} proxy_protocol", direction: inbound, upstream: "127.0.0.1:8082", trusted_ips: [{trusted}],
     send_proxy_protocol: v2}}
"""


def raw(client: socket.socket, _peer: object) -> None:
    """Send back everything that came."""
    client.sendall(relay_net.read_all(client))


def test_the_header_may_come_in_pieces_and_with_the_first_bytes(net: Net, tmp_path: Path) -> None:
    header = build(Header(2, source=CLIENT, destination=FRONT, tlvs=(Tlv(2, b"x" * 5000), Tlv(3, b"1234"))))
    text = LISTENER.format(listen="*:15006", trusted=PEER4, handshake="1m")
    with configured(net, tmp_path, text), serving(net, net.host, ("127.0.0.1", 8082), raw):
        for pieces in ([header + b"hello"], [header[:7], header[7:20], header[20:3000], header[3000:] + b"hel", b"lo"]):
            with net.connect(net.peer, (HOST4, 15006)) as client:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(0.02)
                client.shutdown(socket.SHUT_WR)
                assert relay_net.read_all(client) == header + b"hello"


def is_reset(net: Net, address: tuple[str, int], data: bytes) -> bool:
    try:
        with net.connect(net.peer, address) as client:
            client.sendall(data)
            relay_net.read_all(client)
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("data", [build(Header(1, source=CLIENT, destination=FRONT)), b"", HTTP])
def test_nobody_else_may_send_headers(net: Net, tmp_path: Path, data: bytes) -> None:
    text = LISTENER.format(listen="[::]:15006 ipv6only=off", trusted="203.0.113.0/24", handshake="1m")
    with configured(net, tmp_path, text) as running, serving(net, net.host, ("127.0.0.1", 8082), raw):
        for host in (HOST4, HOST6):
            assert is_reset(net, (host, 15006), data)
        running.wait_for("refused: the source may not send PROXY protocol headers")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HTTP, "refused: no valid PROXY protocol header"),
        (build(Header(2, source=CLIENT, destination=FRONT))[:-1], "refused: the PROXY protocol header or TLS"),
        (b"PROXY TCP4 ", "refused: the PROXY protocol header or TLS"),
    ],
)
def test_trusted_clients_must_send_a_whole_header_in_time(net: Net, tmp_path: Path, data: bytes, reason: str) -> None:
    text = LISTENER.format(listen="*:15006", trusted=PEER4, handshake="500ms")
    with configured(net, tmp_path, text) as running:
        assert is_reset(net, (HOST4, 15006), data)
        running.wait_for(reason)


def test_a_client_that_goes_away_instead_is_forgotten(net: Net, tmp_path: Path) -> None:
    text = LISTENER.format(listen="*:15006", trusted=PEER4, handshake="1m")
    with configured(net, tmp_path, text) as running:
        net.connect(net.peer, (HOST4, 15006)).close()
        running.wait_for("the client left before it was served")


def test_access_rules_are_about_the_client_that_the_header_names(net: Net, tmp_path: Path) -> None:
    text = f"""
listeners:
  - {{listen: "*:15006 proxy_protocol", direction: inbound, upstream: "127.0.0.1:8082", trusted_ips: [{PEER4}],
     access: {{deny: [203.0.113.9]}}}}
"""
    with configured(net, tmp_path, text) as running, serving(net, net.host, ("127.0.0.1", 8082), raw):
        for host, is_admitted in (("203.0.113.9", False), ("203.0.113.10", True)):
            with net.connect(net.peer, (HOST4, 15006)) as client:
                client.sendall(build(Header(1, source=CLIENT._replace(host=host), destination=FRONT)) + b"hi")
                if is_admitted:
                    client.shutdown(socket.SHUT_WR)
                    assert relay_net.read_all(client) == b"hi"
                else:
                    with pytest.raises(ConnectionResetError):
                        relay_net.read_all(client)
        assert running.wait_for("refused: the source is denied")["client"] == "203.0.113.9"


def test_a_unix_socket_is_told_where_to_go_by_the_header(net: Net, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    text = f"""
trusted_ips: ["unix:"]
listeners: [{{listen: "unix:{tmp_path}/r.sock proxy_protocol", direction: outbound}}]
"""
    (tmp_path / "relay.yaml").write_text(text)
    with (
        relay_net.relay(net, tmp_path, "--config", str(tmp_path / "relay.yaml"), user=None),
        serving(net, net.peer, (PEER4, 7000), relay_net.say_who("meant")),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(relay_net.TIMEOUT)
        client.connect(f"{tmp_path}/r.sock")
        client.sendall(build(Header(2, source=CLIENT, destination=Destination(PEER4, 7000))))
        assert relay_net.read_all(client).startswith(b'["meant"')


def test_the_flag_tells_the_application_who_its_client_is(tmp_path: Path) -> None:
    with relay_net.network() as network:
        heard: list[bytes] = []

        def application(client: socket.socket, _peer: object) -> None:
            heard.append(client.recv(200))
            client.sendall(b"!")

        with (
            relay_net.relay(network, tmp_path, "--send-proxy-protocol", "v1"),
            serving(network, network.host, (HOST4, 8080), application),
            network.connect(network.peer, (HOST4, 8080)) as client,
        ):
            assert client.recv(1) == b"!"
            port = client.getsockname()[1]
        assert heard == [f"PROXY TCP4 {PEER4} {HOST4} {port} 8080\r\n".encode()]
