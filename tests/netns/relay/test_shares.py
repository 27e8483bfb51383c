"""Nobody takes what others need: pending queries, connections and descriptors, by direction and by whose they are."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import PEER_SECOND, SERVFAIL, answer_to, framed, query, read_framed
from tests.netns.relay.net import HOST4, PEER4, Net, Server
from tpctl.relay.dns.waiting import KEPT, MAX_PENDING, OWN

pytestmark = pytest.mark.root
FEW = ("prlimit", "--nofile=128:128")
VERY_FEW = ("prlimit", "--nofile=48:48")
DNS_PORT = 15053
TEXT = """
listeners:
  - {{listen: "[::]:1104 ipv6only=off", direction: outbound, upstream: "{peer}:7000"}}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def servers(net: Net) -> Iterator[None]:
    """A server elsewhere, an application here, and a name server that never answers for slow names."""

    def serve(client: socket.socket, _peer: object) -> None:
        while message := read_framed(client):
            client.sendall(framed(answer_to(message, 1)))

    running = [Server(net.listen(net.peer, (PEER4, 7000)), relay_net.echo),
               Server(net.listen(net.host, ("0.0.0.0", 8080)), relay_net.echo),
               Server(net.listen(net.peer, (PEER4, 53)), serve)]  # fmt: skip
    with dns_net.name_server(net, PEER4, lambda message: [] if b"slow" in message else [answer_to(message, 1)]):
        yield
    for server in running:
        server.close()


def slow_query(number: int) -> bytes:
    label = b"slow%d" % number
    return query(number % 65536, bytes((len(label),)) + label + b"\x07example\x03com\x00\x00\x01\x00\x01")


def flood(net: Net, address: str, count: int) -> socket.socket:
    """A neighbour's queries for slow names, from one socket, each of which the relay has read."""
    client = net.datagram(net.peer, socket.AF_INET, (address, 0))
    client.connect((HOST4, DNS_PORT))
    for number in range(count):
        client.send(slow_query(number))
        if number % 64 == 0:
            relay_net.until(lambda: dns_net.drained(net, net.host, DNS_PORT))
    return client


def neighbour_is_answered(net: Net, address: str) -> None:
    with net.datagram(net.peer, socket.AF_INET, (address, 0)) as client:
        client.connect((HOST4, DNS_PORT))
        client.send(query(7))
        assert client.recv(4096) == answer_to(query(7), 1)


def host_is_answered(net: Net, identifier: int = 1) -> None:
    assert dns_net.ask(net, PEER4, identifier) == answer_to(query(identifier), 1)


def host_is_answered_over_tcp(net: Net) -> None:
    with net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(framed(query(3)))
        assert read_framed(client) == answer_to(query(3), 1)


@pytest.mark.parametrize("prefix", [(), FEW], ids=["descriptors for all", "few descriptors"])
def test_a_neighbours_slow_names_cost_nobody_else_an_answer(
    net: Net, servers: None, tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    with relay(net, tmp_path, prefix), contextlib.closing(flood(net, PEER4, MAX_PENDING + 200)) as greedy:
        assert greedy.recv(4096)[3] & 0x0F == SERVFAIL
        for number in range(20):
            host_is_answered(net, number)
        host_is_answered_over_tcp(net)
        neighbour_is_answered(net, PEER_SECOND)
        # Another one has its share even where the first has taken all that is for neighbours.
        with contextlib.closing(flood(net, PEER_SECOND, 10)):
            host_is_answered(net)


def test_our_own_slow_names_leave_neighbours_theirs(net: Net, servers: None, tmp_path: Path) -> None:
    with relay(net, tmp_path), net.datagram(net.host, socket.AF_INET) as client:
        client.connect((PEER4, 53))
        for number in range(MAX_PENDING):
            client.send(slow_query(number))
            if number % 64 == 0:
                relay_net.until(lambda: dns_net.drained(net, net.host, DNS_PORT))
        neighbour_is_answered(net, PEER4)


def test_half_of_the_table_is_ours(net: Net, servers: None, tmp_path: Path) -> None:
    """While a neighbour has all that it can get."""
    with (
        relay(net, tmp_path),
        contextlib.closing(flood(net, PEER4, MAX_PENDING)),
        net.datagram(net.host, socket.AF_INET) as client,
    ):
        client.connect((PEER4, 53))
        for number in range(KEPT[OWN]):
            client.send(slow_query(number))
            if number % 64 == 0:
                relay_net.until(lambda: dns_net.drained(net, net.host, DNS_PORT))
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):  # none of them is refused
            client.recv(4096)


@contextlib.contextmanager
def relay(net: Net, directory: Path, prefix: tuple[str, ...] = (), *options: str) -> Iterator[relay_net.Relay]:
    resolv_conf = dns_net.readable(directory, "resolv.conf", f"nameserver {PEER4}\noptions timeout:30\n")
    try:
        with relay_net.relay(net, directory, "--resolv-conf", str(resolv_conf), *options, prefix=prefix) as running:
            yield running
    finally:
        resolv_conf.unlink()


def idle(net: Net, name: str, address: tuple[str, int], count: int, stack: contextlib.ExitStack) -> None:
    """Clients that have come and say nothing; those for which there is no room wait, or are reset."""
    for _ in range(count):
        with contextlib.suppress(ConnectionError):
            stack.enter_context(net.connect(name, address))


def served(net: Net, name: str, address: tuple[str, int]) -> None:
    with net.connect(name, address) as client:
        client.sendall(b"ping")
        assert client.recv(4) == b"ping"


@pytest.mark.parametrize("prefix", [FEW, VERY_FEW], ids=["128", "48"])
def test_idle_inbound_connections_leave_room_for_what_we_need(
    net: Net, servers: None, tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    with relay(net, tmp_path, prefix) as running, contextlib.ExitStack() as stack:
        idle(net, net.peer, (HOST4, 8080), 150, stack)
        running.wait_for("out of resources, accepting is paused", listener="inbound")
        for _ in range(5):
            served(net, net.host, (PEER4, 7000))
            host_is_answered(net)
            host_is_answered_over_tcp(net)


@pytest.mark.parametrize("prefix", [FEW, VERY_FEW], ids=["128", "48"])
def test_our_idle_connections_leave_room_for_clients(
    net: Net, servers: None, tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    with relay(net, tmp_path, prefix) as running, contextlib.ExitStack() as stack:
        idle(net, net.host, (PEER4, 7000), 150, stack)
        running.wait_for("out of resources, accepting is paused", listener="outbound")
        for _ in range(5):
            served(net, net.peer, (HOST4, 8080))
            host_is_answered(net)


def test_connections_that_others_make_through_us_leave_ours_room(net: Net, servers: None, tmp_path: Path) -> None:
    path = dns_net.readable(tmp_path, "relay.yaml", TEXT.format(peer=PEER4))
    rule = ("PREROUTING", "-p", "tcp", "--dport", "1104", "-j", "ACCEPT")
    net.on_host("iptables", "-w", "-t", "nat", "-I", *rule)
    try:
        with relay_net.relay(net, tmp_path, "--config", str(path), prefix=FEW) as running:
            with contextlib.ExitStack() as stack:
                idle(net, net.peer, (HOST4, 1104), 150, stack)
                running.wait_for("refused: out of resources for connections that other hosts make through this one")
                for _ in range(5):
                    served(net, net.host, ("127.0.0.1", 1104))
            relay_net.until(lambda: is_served(net))
    finally:
        net.on_host("iptables", "-w", "-t", "nat", "-D", *rule)
        path.unlink()


def is_served(net: Net) -> bool:
    with contextlib.suppress(ConnectionError):
        served(net, net.peer, (HOST4, 1104))
        return True
    return False


def test_a_neighbours_connections_to_the_name_server_leave_ours_room(net: Net, servers: None, tmp_path: Path) -> None:
    rule = ("PREROUTING", "-p", "tcp", "--dport", str(DNS_PORT), "-j", "ACCEPT")
    net.on_host("iptables", "-w", "-t", "nat", "-I", *rule)
    try:
        with relay(net, tmp_path, FEW), contextlib.ExitStack() as stack:
            ours = stack.enter_context(net.connect(net.host, (PEER4, 53)))
            ours.sendall(framed(query(1)))
            assert read_framed(ours) == answer_to(query(1), 1)
            for number in range(300):  # each is busy with a slow name, and later than ours
                with contextlib.suppress(ConnectionError):
                    client = stack.enter_context(net.connect(net.peer, (HOST4, DNS_PORT)))
                    client.sendall(framed(slow_query(number)))
            host_is_answered_over_tcp(net)
            ours.sendall(framed(query(2)))
            assert read_framed(ours) == answer_to(query(2), 1), "it made room for somebody else's"
    finally:
        net.on_host("iptables", "-w", "-t", "nat", "-D", *rule)
