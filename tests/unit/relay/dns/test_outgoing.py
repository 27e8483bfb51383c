"""Sockets towards a name server: how long one is used, and what ends its use. Real sockets on the loopback address."""

from __future__ import annotations

import collections
import itertools
import socket
import time
from collections.abc import Iterator

import pytest

from tpctl.relay.dns.outgoing import LEAST_IDLE, LIFE_SECONDS, MAX_USES, Outgoing, OutgoingSockets
from tpctl.relay.loop.descriptors import SPARE, unlimited
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.loop.shares import Shares

PATIENCE = 60.0


class Resolver:
    """A name server that only listens, and the sockets of a relay that asks it."""

    def __init__(self, descriptors: Shares) -> None:
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.destination = Destination(*self.server.getsockname())
        self.loop = Loop()
        self.descriptors = descriptors
        self.sockets = OutgoingSockets[str](self.loop, descriptors, self._on_readable)
        self.heard: list[bytes] = []

    def _on_readable(self, outgoing: Outgoing[str], _mask: int) -> None:
        self.heard.append(outgoing.sock.recv(512))
        self.sockets.discard(outgoing)

    def take(self) -> Outgoing[str]:
        return self.sockets.take(self.destination, "a query")

    def turn(self, seconds: float = 0.0) -> None:
        self.loop.later(seconds, self.loop.stop)
        self.loop.run()

    def close(self) -> None:
        self.sockets.close_idle()
        self.loop.release()
        self.server.close()


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    made = Resolver(unlimited())
    yield made
    made.close()


def port(outgoing: Outgoing[str]) -> int:
    return outgoing.local[1]


def ports_of(resolver: Resolver, queries: int) -> list[int]:
    """The ports of queries that are answered one after the other."""
    found = []
    for _ in range(queries):
        outgoing = resolver.take()
        found.append(port(outgoing))
        resolver.sockets.give(outgoing)
    return found


def test_a_port_serves_some_queries_and_never_the_next_one_for_certain(resolver: Resolver) -> None:
    ports = ports_of(resolver, 4000)
    uses = collections.Counter(ports)
    assert max(uses.values()) == MAX_USES
    assert len(uses) < 1000, "a socket of its own for each would make all this useless"
    assert len(set(ports[:LEAST_IDLE])) == LEAST_IDLE
    again = sum(one == another for one, another in itertools.pairwise(ports))
    assert again < 1000, "chance is one in 16, so 250"


def test_each_query_has_a_socket_to_itself_and_an_id_of_its_own(resolver: Resolver) -> None:
    taken = [resolver.take() for _ in range(300)]
    assert len({port(one) for one in taken}) == 300
    assert len({one.identifier for one in taken}) > 280, "16 bits at random, so that hardly any are equal"
    assert all(resolver.sockets.is_own(("127.0.0.1", port(one))) for one in taken)
    for one in taken:
        resolver.sockets.discard(one)
    assert not any(resolver.sockets.is_own(("127.0.0.1", port(one))) for one in taken)


def test_what_arrives_between_two_queries_is_seen_and_ends_the_use(resolver: Resolver) -> None:
    first = resolver.take()
    resolver.sockets.give(first)
    resolver.server.sendto(b"a guess", first.local)
    end = time.monotonic() + PATIENCE
    while not resolver.heard:
        assert time.monotonic() < end
        resolver.turn(0.01)
    assert first.sock.fileno() == -1
    assert not resolver.sockets.is_own(first.local)


def test_a_socket_on_which_something_strange_came_serves_no_other_query(resolver: Resolver) -> None:
    first = resolver.take()
    first.strange = 1
    resolver.sockets.give(first)
    resolver.turn()
    assert first.sock.fileno() == -1


def test_sockets_grow_old(resolver: Resolver) -> None:
    idle, busy = resolver.take(), resolver.take()
    resolver.sockets.give(idle)
    resolver.turn(2 * LIFE_SECONDS + 0.5)
    assert idle.sock.fileno() == -1
    resolver.sockets.give(busy)
    resolver.turn()
    assert busy.sock.fileno() == -1, "it was as old, and served a query still"


@pytest.mark.parametrize(("total", "kept"), [(16 * 20, 20), (16 * 15, 0)])
def test_idle_sockets_take_few_descriptors_and_give_them_back(total: int, kept: int) -> None:
    """Or none, where they are too few to choose from."""
    descriptors = Shares(total, [0] * (SPARE + 1))
    resolver = Resolver(descriptors)
    taken = [resolver.take() for _ in range(30)]
    for one in taken:
        resolver.sockets.give(one)
    resolver.turn()
    assert sum(one.sock.fileno() != -1 for one in taken) == descriptors.used(SPARE) == kept
    resolver.close()
    assert descriptors.used(SPARE) == 0
