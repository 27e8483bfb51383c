"""A dial of the relay that conntrack takes for an application's connection, and brings back to the relay.

That happens when the dial gets the source port of a connection that was redirected, and that its server has reset a
moment ago. Linux gives connect() the even ports of an even range first, so a range of few ports makes it certain.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, server_context
from tests.netns.relay.net import HOST, PEER, PEER4, Net, Relay
from tests.netns.relay.test_listeners import configured, serving

pytestmark = pytest.mark.root
PORT = 9000
REMEMBERED = (40000, 40002)
ALL = "40000 40003"
ELSEWHERE = "50000 50999"
OUTBOUND = """
workers: {workers}
listeners: [{{listen: "[::]:15001 ipv6only=off", direction: outbound{more}}}]
"""


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network() as network:
        network.on_host("sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=0")  # ports are free again at once
        yield network


def reset(client: socket.socket, _peer: Any) -> None:
    """A service that resets who says something."""
    client.recv(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def dial_from(net: Net, range_of_ports: str) -> None:
    """Give sockets of our host ports of this range from now on."""
    net.on_host("sysctl", "-qw", f"net.ipv4.ip_local_port_range={range_of_ports}")


def bind(client: socket.socket, address: tuple[str, int]) -> None:
    """Take a port, once a dial of the relay that is just ending has given it back."""
    end = time.monotonic() + relay_net.TIMEOUT
    while True:
        try:
            client.bind(address)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def connect(net: Net, family: socket.AddressFamily, port: int) -> socket.socket:
    """An application's connection from a port."""
    with net.inside(net.host):
        client = socket.socket(family)
    client.settimeout(relay_net.TIMEOUT)
    try:
        bind(client, (HOST[family], port))
        client.connect((PEER[family], PORT))
    except OSError:
        client.close()
        raise
    return client


def speak(net: Net, family: socket.AddressFamily, port: int) -> bytes:
    """Say something from a port, and hear the answer."""
    with connect(net, family, port) as client:
        client.sendall(b"x")
        return client.recv(1)


def make_conntrack_remember(net: Net, family: socket.AddressFamily) -> None:
    """Connections that were redirected from `REMEMBERED`, and that their server has reset."""
    dial_from(net, ELSEWHERE)
    with serving(net, net.peer, (PEER[family], PORT), reset):
        for port in REMEMBERED:
            with pytest.raises(ConnectionResetError):
                speak(net, family, port)
    dial_from(net, ALL)


def hops(running: Relay, count: int) -> list[int]:
    """Of the connections in the access log that did not end by a reset, once there are so many."""
    end = time.monotonic() + relay_net.TIMEOUT
    while time.monotonic() < end:
        lines = [line for line in running.lines() if line["event"] == "connection" and line["reason"] == "closed"]
        if len(lines) >= count:
            break
        time.sleep(0.02)
    return sorted(line["hops"] for line in lines)


def ports(workers: int) -> range:
    """Of clients, one after the other. Of two workers, either may get a dial that is brought back."""
    return range(45000, 45001 if workers == 1 else 45006)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_it_is_dialled_again(net: Net, tmp_path: Path, family: socket.AddressFamily) -> None:
    sent = relay_net.pattern(3_000_000)
    with configured(net, tmp_path, OUTBOUND.format(workers=1, more="")) as running:
        make_conntrack_remember(net, family)
        with (
            serving(net, net.peer, (PEER[family], PORT), relay_net.digest_service(1_000_000)),
            connect(net, family, 45000) as client,
        ):
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert relay_net.read_all(client) == hashlib.sha256(sent).digest() + relay_net.pattern(1_000_000)
        assert hops(running, 3) == [0, 1, 2], "both ports were tried, and both dials came back"


def test_a_server_that_speaks_first_and_one_that_resets(net: Net, tmp_path: Path) -> None:
    with configured(net, tmp_path, OUTBOUND.format(workers=1, more="")):
        make_conntrack_remember(net, socket.AF_INET)
        with (
            serving(net, net.peer, (PEER4, PORT), lambda client, _peer: client.sendall(b"220 hello")),
            connect(net, socket.AF_INET, 45000) as client,
        ):
            assert relay_net.read_all(client) == b"220 hello"
        make_conntrack_remember(net, socket.AF_INET)
        with serving(net, net.peer, (PEER4, PORT), reset), pytest.raises(ConnectionResetError):
            speak(net, socket.AF_INET, 45001)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_header_is_sent_once(net: Net, tmp_path: Path, workers: int) -> None:
    def heard(client: socket.socket, _peer: Any) -> None:
        client.sendall(relay_net.read_all(client))

    text = OUTBOUND.format(workers=workers, more=", send_proxy_protocol: v1")
    with configured(net, tmp_path, text) as running:
        for port in ports(workers):
            make_conntrack_remember(net, socket.AF_INET)
            with serving(net, net.peer, (PEER4, PORT), heard), connect(net, socket.AF_INET, port) as client:
                client.sendall(b"GET")
                client.shutdown(socket.SHUT_WR)
                assert relay_net.read_all(client) == f"PROXY TCP4 10.99.0.2 {PEER4} {port} {PORT}\r\nGET".encode()
        times = len(ports(workers))
        assert hops(running, 3 * times) == [0] * times + [1] * times + [2] * times


@pytest.mark.parametrize("workers", [1, 2])
def test_tls_with_the_upstream_is_begun_once(net: Net, workers: int) -> None:
    with relay_net.public_directory() as directory:
        pki = Pki(directory)
        context = server_context(pki.server)

        def encrypted(client: socket.socket, peer: Any) -> None:
            with context.wrap_socket(client, server_side=True) as secure:
                relay_net.echo(secure, peer)
                secure.unwrap()

        more = f", upstream_tls: {{ca_file: {pki.root.path}, server_name: server.test}}"
        with configured(net, directory, OUTBOUND.format(workers=workers, more=more)) as running:
            for port in ports(workers):
                make_conntrack_remember(net, socket.AF_INET)
                with serving(net, net.peer, (PEER4, PORT), encrypted), connect(net, socket.AF_INET, port) as client:
                    client.sendall(b"secret")
                    client.shutdown(socket.SHUT_WR)
                    assert relay_net.read_all(client) == b"secret"
            times = len(ports(workers))
            assert hops(running, 3 * times) == [0] * times + [1] * times + [2] * times


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_an_application_does_not_get_the_port_of_a_dial_that_was_reset(
    net: Net, tmp_path: Path, family: socket.AddressFamily
) -> None:
    """conntrack remembers that the dial was not redirected, and would let the application go past the relay."""
    with configured(net, tmp_path, OUTBOUND.format(workers=1, more="")):
        dial_from(net, ALL)
        with serving(net, net.peer, (PEER[family], PORT), reset) as server:
            clients = [connect(net, family, port) for port in (45000, 45001)]
            for client in clients:
                client.sendall(b"x")
            for client in clients:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
                client.close()
            assert {peer[1] for peer in server.peers} == set(REMEMBERED)
        with (
            serving(net, net.peer, (PEER[family], PORT), relay_net.echo) as server,
            net.connect(net.host, (PEER[family], PORT)) as client,
        ):
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
            assert client.getsockname()[1] != server.peers[0][1], "it is the relay that the server sees"


def test_connections_that_come_back_again_and_again_end_with_several_workers_too(net: Net, tmp_path: Path) -> None:
    """As root, which is not the user that the rules let pass."""
    with relay_net.relay(net, tmp_path, "--workers", "2", user=None) as running:
        for _ in range(5):
            with contextlib.suppress(ConnectionResetError), net.connect(net.host, (PEER4, 4444)) as client:
                assert client.recv(1) == b"", "nobody is there"
        running.wait_for("refused: the relay's own connections come back")
        assert len(running.log_text().splitlines()) < 200
