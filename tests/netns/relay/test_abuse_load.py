"""Clients that take what they can: slow ones, more than there are descriptors, thousands of half-open connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay import syn_flood
from tests.netns.relay.certificates import Pki, client_context
from tests.netns.relay.dns_net import framed, query, read_framed
from tests.netns.relay.net import HOST, HOST4, PEER4, Net, Relay
from tests.netns.relay.test_dns_hostile import descriptors, memory_kb, settled
from tests.netns.relay.test_life import cpu_seconds
from tests.netns.relay.test_listeners import configured, serving
from tpctl.relay.connections.proxy_protocol import Header, build
from tpctl.relay.loop.original_destination import Destination

pytestmark = pytest.mark.root
HALF_OPEN = 100_000
SLOW = 100
"""Slow clients of each kind."""
HANDSHAKE_SECONDS = 2.0
DNS_SECONDS = 10.0
PROXY, TLS, DNS, PLAIN = 1101, 1102, 15053, 1104
TEXT = """
dns: {{zone_file: {zone}}}
timeouts: {{handshake: 2s}}
listeners:
  - {{listen: "*:1101 proxy_protocol", direction: outbound, upstream: "{peer}:7000", name: a,
     trusted_ips: [10.99.0.0/24]}}
  - {{listen: "*:1102 ssl", direction: outbound, upstream: "{peer}:7000", name: b,
     ssl: {{certificate: {certificate}, certificate_key: {key}}}}}
  - {{listen: "*:15053", direction: dns}}
  - {{listen: "*:1104", direction: outbound, upstream: "{peer}:7000", name: d}}
"""
HEADER = build(Header(1, source=Destination("203.0.113.9", 40000), destination=Destination("203.0.113.80", 443)))
QUESTION = b"\x02db\x04mesh\x00\x00\x01\x00\x01"
RARE = (13, 24, 29, 35, 42, 45, 55, 99, 256)
"""Kinds of records for which a library may have to read a file."""
MAX_GROWTH_KB = 8 * 1024


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@pytest.fixture
def text(directory: Path) -> str:
    certificate, key = Pki(directory).server
    zone = directory / "hosts"
    zone.write_text("240.0.0.1 db.mesh\n")
    return TEXT.format(zone=zone, peer=PEER4, certificate=certificate, key=key)


def hello() -> bytes:
    """The beginning of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client_context(None).wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


class Slow:
    """Clients that send one byte four times a second at most, and have more to say than a timeout lasts."""

    def __init__(self, net: Net, port: int, words: bytes) -> None:
        self.words = words
        self.begun = time.monotonic()
        self.sent = 0
        self.open = [net.connect(net.peer, (HOST4, port)) for _ in range(SLOW)]
        self.last_ended: float | None = None

    def turn(self) -> None:
        """Another byte from each that is still there."""
        left = []
        for client in self.open:
            try:
                client.setblocking(False)
                client.send(self.words[self.sent : self.sent + 1])
                with contextlib.suppress(BlockingIOError):
                    if client.recv(1) == b"":
                        raise ConnectionResetError
                left.append(client)
            except OSError:
                client.close()
        self.open = left
        self.sent += 1
        if not left and self.last_ended is None:
            self.last_ended = time.monotonic() - self.begun


def served(net: Net, port: int) -> None:
    """An ordinary client gets what it came for."""
    with net.connect(net.peer, (HOST4, port)) as plain:
        if port == DNS:
            plain.sendall(framed(query(7, QUESTION)))
            assert read_framed(plain).endswith(b"\xf0\0\0\1")
        elif port == TLS:
            with client_context(None).wrap_socket(plain) as client:
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"
        else:
            plain.sendall((HEADER if port == PROXY else b"") + b"hello")
            assert plain.recv(5) == b"hello"


def test_slow_clients_are_ended_and_hold_up_nobody(net: Net, directory: Path, text: str) -> None:
    with configured(net, directory, text) as running, serving(net, net.peer, (PEER4, 7000), relay_net.echo):
        for port in (PROXY, TLS, DNS):
            served(net, port)
        before = descriptors(running)
        slow = {port: Slow(net, port, words) for port, words in (
            (PROXY, HEADER), (TLS, hello()), (DNS, framed(query(7, QUESTION * 20)))
        )}  # fmt: skip
        end = time.monotonic() + DNS_SECONDS + relay_net.PATIENCE
        while any(one.open for one in slow.values()):
            assert time.monotonic() < end, {port: len(one.open) for port, one in slow.items()}
            for port, one in slow.items():
                one.turn()
                served(net, port)
            time.sleep(0.25)
        for port, patience in ((PROXY, HANDSHAKE_SECONDS), (TLS, HANDSHAKE_SECONDS), (DNS, DNS_SECONDS)):
            one = slow[port]
            assert one.last_ended is not None
            assert one.last_ended > patience * 0.9, port
            assert one.sent < len(one.words), (port, "its bytes have kept it alive to the end")
        running.wait_for("refused: the PROXY protocol header or TLS handshake did not come in time")
        settled(running, before + 5)


def crowd(net: Net, ports: Sequence[int], count: int, stack: contextlib.ExitStack) -> None:
    """Clients that have come and want something; the kernel takes those that the relay cannot."""
    for number in range(count):
        with contextlib.suppress(OSError):  # one for which there is no descriptor to dial with is reset
            client = stack.enter_context(net.connect(net.peer, (HOST4, ports[number % len(ports)])))
            client.sendall(b"P")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_more_clients_than_descriptors(net: Net, directory: Path, text: str, workers: str) -> None:
    """Nobody crashes, nobody spins, and there is service again when they leave."""
    ports = (PLAIN, PROXY, TLS, DNS)
    (directory / "relay.yaml").write_text(text)
    options = ("--config", str(directory / "relay.yaml"), "--workers", workers)
    with (
        relay_net.relay(net, directory, *options, prefix=("prlimit", "--nofile=64:64")) as running,
        serving(net, net.peer, (PEER4, 7000), relay_net.echo),
    ):
        for port in ports:
            served(net, port)
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                crowd(net, ports, 300, stack)
                running.wait_for("refused: out of resources")
                before = cpu(running)
                time.sleep(1.5)
                assert cpu(running) - before < 0.75, "it spins"
                with net.datagram(net.peer, socket.AF_INET) as asking:
                    asking.connect((HOST4, DNS))  # takes no descriptor
                    asking.send(query(9, QUESTION))
                    assert asking.recv(4096).endswith(b"\xf0\0\0\1")
                    for kind in RARE:
                        asking.send(with_record(kind))
                        assert asking.recv(4096)[:2] == b"\0\x09"
            for port in ports:
                eventually(lambda port=port: served(net, port))  # type: ignore[misc]


def with_record(kind: int) -> bytes:
    """A query for a name of the zone, with an additional record."""
    message = query(9, QUESTION)
    return message[:11] + b"\1" + message[12:] + b"\0" + kind.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\2ab"


def cpu(running: Relay) -> float:
    pid = running.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(cpu_seconds(one) for one in (pid, *map(int, children)))


def eventually(act: Callable[[], None]) -> None:
    """When those who have gone are forgotten."""
    end = time.monotonic() + relay_net.PATIENCE
    while True:
        try:
            act()
        except (OSError, AssertionError):
            assert time.monotonic() < end
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_half_open_connections_cost_the_relay_nothing(directory: Path, family: socket.AddressFamily) -> None:
    """And real clients get through meanwhile: the kernel keeps 4096 of them, and answers the rest with SYN cookies."""
    with relay_net.network() as network:
        syn_flood.prepare(network)
        with (
            relay_net.relay(network, directory) as running,
            serving(network, network.host, (HOST[family], 8080), relay_net.echo),
        ):
            echoed(network, family)
            memory, open_before, used = memory_kb(running), descriptors(running), cpu(running)
            flooding = threading.Thread(target=syn_flood.flood, args=(network, family, 8080, HALF_OPEN))
            begun = time.monotonic()
            flooding.start()
            clients = 0
            while flooding.is_alive() or not clients:
                echoed(network, family)
                clients += 1
            flooding.join()
            took = time.monotonic() - begun
            half_open = network.on_host("ss", "-Htn", "state", "syn-recv").count("\n")
            assert half_open > 100, "the SYNs did not arrive"
            echoed(network, family)
            print(f"{HALF_OPEN} SYNs in {took:.1f} s, {half_open} half-open at the end, {clients} clients meanwhile, "
                  f"{cpu(running) - used:.2f} s of CPU time, {memory_kb(running) - memory} KB more")  # fmt: skip
            settled(running, open_before + 5)
            assert memory_kb(running) - memory < MAX_GROWTH_KB


def echoed(net: Net, family: socket.AddressFamily) -> None:
    with net.connect(net.peer, (HOST[family], 8080)) as client:
        client.sendall(b"real")
        assert client.recv(4) == b"real"
