"""The DNS side as the worker uses it: listeners that come, change and go, on real sockets."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.message
import pytest
import structlog

from tpctl.relay.connections.dials import SelfDialGuard
from tpctl.relay.dns.neighbours import Neighbours
from tpctl.relay.dns.server import DnsServer
from tpctl.relay.dns.tcp_upstream import framed, take_frame
from tpctl.relay.loop import packet_info
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.dns import DnsSettings

PATIENCE = 60.0
QUERY = dns.message.make_query("db.mesh", "A", id=5).to_wire()
ZONE = """
names:
  db.mesh: {addresses: 240.0.0.1, upstreams: [10.0.0.1, 10.0.0.2, 10.0.0.3]}
"""


class Served:
    """A server, its loop, and its listeners."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        zone_file = directory / "zone.yaml"
        zone_file.write_text(ZONE)
        (directory / "resolv.conf").write_text("nameserver fe80::1%none\n")  # which cannot be asked
        self.settings = DnsSettings(directory / "resolv.conf", zone_file)
        guard = SelfDialGuard(frozenset(), lambda _destination: False)
        self.server = DnsServer(self.loop, self.settings, guard, structlog.get_logger())
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        packet_info.enable(self.udp)
        self.udp.bind(("127.0.0.1", 0))
        self.tcp = socket.create_server(("127.0.0.1", 0))
        for listener in (self.udp, self.tcp):
            listener.setblocking(False)

    def listen(self, allows: Callable[[str], bool] | None = None) -> None:
        self.server.listen(self.udp, allows)
        self.server.listen(self.tcp, allows)

    def turn(self, until: Callable[[], object] = lambda: True) -> None:
        """Let the loop do what there is to do, and until something has come true."""
        end = time.monotonic() + PATIENCE
        while True:
            self.loop.later(0.2, self.loop.stop)
            self.loop.run()
            if until():
                return
            assert time.monotonic() < end

    def ask_udp(self, turns: int = 100) -> bytes:
        """The answer; nothing when there is none within so many turns."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(QUERY, self.udp.getsockname())
            return self._heard(client, turns)

    def ask_tcp(self, turns: int = 100) -> bytes:
        """The same over TCP; nothing when the connection is closed, too."""
        with socket.create_connection(self.tcp.getsockname(), timeout=PATIENCE) as client:
            client.sendall(framed(QUERY))
            return take_frame(bytearray(self._heard(client, turns))) or b""

    def _heard(self, client: socket.socket, turns: int) -> bytes:
        client.setblocking(False)
        for _ in range(turns):
            self.turn()
            with contextlib.suppress(BlockingIOError):
                try:
                    return client.recv(512)
                except ConnectionResetError:
                    return b""
        return b""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.server.reset()
    made.loop.release()
    made.udp.close()
    made.tcp.close()


def address(answer: bytes) -> str:
    return str(dns.message.from_wire(answer).answer[0][0])


def test_both_transports_are_served(served: Served) -> None:
    served.listen()
    assert address(served.ask_udp()) == address(served.ask_tcp()) == "240.0.0.1"
    assert (served.server.counters.udp, served.server.counters.tcp, served.server.counters.local) == (1, 1, 2)
    assert served.server.busy == 0


def test_the_rule_of_a_listener_can_be_replaced(served: Served) -> None:
    served.listen(lambda host: host != "127.0.0.1")
    assert served.ask_udp(turns=1) == served.ask_tcp() == b""
    served.listen()
    assert address(served.ask_udp()) == address(served.ask_tcp()) == "240.0.0.1"


def test_a_listener_goes_and_the_other_stays(served: Served) -> None:
    served.listen()
    served.server.leave(served.tcp)
    assert address(served.ask_udp()) == "240.0.0.1"
    served.server.leave(served.udp)
    served.turn()
    assert served.udp.fileno() == served.tcp.fileno() == -1


def test_what_waits_is_answered_at_the_end(served: Served) -> None:
    served.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(QUERY, served.udp.getsockname())
        arrives(served.udp)
        served.server.drain(lambda: None)
        assert address(client.recv(512)) == "240.0.0.1"
    assert served.ask_udp(turns=1) == b""


def arrives(sock: socket.socket) -> None:
    """The kernel may pass on a little later what was sent."""
    assert select.select([sock], [], [], PATIENCE)[0]


def test_what_waits_can_be_left_to_whoever_takes_over(served: Served) -> None:
    served.listen()
    successor = served.udp.dup()
    with successor, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(QUERY, served.udp.getsockname())
        arrives(served.udp)
        served.server.drain(lambda: None, leave_waiting=True)
        served.turn()
        assert successor.recv(512) == QUERY


def test_idle_connections_end_with_the_server(served: Served) -> None:
    served.listen()
    with socket.create_connection(served.tcp.getsockname(), timeout=PATIENCE) as client:
        arrives(served.tcp)
        served.turn()
        served.server.drain(lambda: None)
        served.turn()
        assert client.recv(1) == b""
    assert served.server.busy == 0


def test_upstreams_of_a_virtual_address_take_turns(served: Served) -> None:
    destination = Destination("240.0.0.1", 80)
    first = [(served.server.upstreams(destination) or ())[0].host for _ in range(6)]
    assert first == ["10.0.0.1", "10.0.0.2", "10.0.0.3"] * 2
    assert served.server.upstreams(Destination("10.0.0.1", 80)) is None
    served.server.use(DnsSettings(served.settings.resolv_conf))
    assert served.server.upstreams(destination) is None


def test_other_name_servers_are_used_at_once(served: Served, tmp_path: Path) -> None:
    query = dns.message.make_query("example.com", "A", id=6).to_wire()
    other = tmp_path / "other.conf"
    other.write_text("nameserver 127.0.0.1\n")
    served.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for expected in (0, 1):
            client.sendto(query, served.udp.getsockname())
            served.turn(lambda: served.server.counters.udp == expected + 1)  # noqa: B023 - asked at once
            assert served.server.counters.forwarded == expected
            served.server.use(DnsSettings(other, served.settings.zone_file))


def test_the_kernel_is_asked_once_in_a_while_who_is_near() -> None:
    now = [0.0]
    asked: list[str] = []
    refused: list[object] = []

    def is_near(host: str) -> bool:
        asked.append(host)
        return host != "198.18.0.9"

    class Complaints:
        def warn(self, _subject: str, **details: object) -> None:
            refused.append(details["client"])

    neighbours = Neighbours(Complaints(), is_near, lambda: now[0])  # type: ignore[arg-type]
    for _ in range(3):
        assert neighbours("127.0.0.1")
        assert neighbours("::1")
        assert neighbours("10.0.0.9")
        assert neighbours("fe80::9%eth0")
        assert not neighbours("198.18.0.9")
    assert asked == ["10.0.0.9", "fe80::9%eth0", "198.18.0.9"]
    assert refused == ["198.18.0.9"] * 3
    now[0] = 60.0
    assert neighbours("10.0.0.9")
    assert len(asked) == 4
