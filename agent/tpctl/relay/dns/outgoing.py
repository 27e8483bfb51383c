"""Sockets towards name servers, for queries over UDP.

Each is connected to one server: the kernel chooses an unpredictable port and drops what other addresses send to it. It
serves one query at a time, a few one after the other, within a second or two. To make a socket, to have conntrack learn
about it and to close it would cost more than all else that a query takes.

Whoever guesses answers gains nothing by this. A guess still has to have the port and the id of the moment. The port of
a query does not tell that of the next one, which is drawn from several. And anything but the answer that is awaited, at
any time, ends the use of a port: one that is found out is gone with the packet that found it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from select import EPOLLIN
from typing import Generic, TypeVar

from tpctl.relay.loop.descriptors import SPARE
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.loop.shares import Shares

Q = TypeVar("Q")

MAX_USES = 16
"""Queries of one socket: a sixteenth of its cost for each is little enough."""
LIFE_SECONDS = 1.0
"""Sockets that are this old, or twice as old at most, serve no other query."""
LEAST_IDLE, MOST_IDLE = 16, 256
"""A query has one of so many idle sockets, or a new one."""
_PART = 16
_DRAWN = 256
"""Random numbers that are asked for at once: of which socket, and which id."""
_NUMBERS_OF_A_QUERY = 2


class Outgoing(Generic[Q]):
    """One socket, and the query that it serves at the moment."""

    __slots__ = ("generation", "identifier", "local", "query", "server", "sock", "strange", "uses")

    def __init__(self, sock: socket.socket, server: Destination, local: tuple[str, int], generation: int) -> None:
        self.sock = sock
        self.server = server
        self.local = local
        self.generation = generation
        self.query: Q | None = None
        self.identifier = 0
        """Under which the query was sent."""
        self.uses = 0
        self.strange = 0
        """Messages that were not the answer."""


class OutgoingSockets(Generic[Q]):
    """Those of one worker."""

    def __init__(self, loop: Loop, descriptors: Shares, on_readable: Callable[[Outgoing[Q], int], None]) -> None:
        """Idle sockets have a sixteenth of the descriptors at most. Those of queries are the queries' own."""
        self._loop = loop
        self._descriptors = descriptors
        self._on_readable = on_readable
        most = min(MOST_IDLE, descriptors.total // _PART)
        self._most_idle = most if most >= LEAST_IDLE else 0
        self._room = 0
        """Descriptors that have been taken for idle sockets."""
        self._idle: dict[tuple[str, int, int], list[Outgoing[Q]]] = {}
        self._idle_count = 0
        self._generation = 0
        self._is_timed = False
        self._own: set[tuple[str, int]] = set()
        self._drawn: list[int] = []
        """Numbers of 16 bits that nobody can predict."""

    def is_own(self, address: tuple[str, int]) -> bool:
        """Whether this is the address of one of these sockets."""
        return address in self._own

    def take(self, server: Destination, query: Q) -> Outgoing[Q]:
        """A socket for a query, with the id to send it under. Raises OSError."""
        idle = self._idle.get((server.host, server.port, server.scope))
        if len(self._drawn) < _NUMBERS_OF_A_QUERY:
            self._drawn = memoryview(os.urandom(2 * _DRAWN)).cast("H").tolist()
        if idle and len(idle) >= LEAST_IDLE:
            chosen = self._drawn.pop() % len(idle)
            outgoing = idle[chosen]
            idle[chosen] = idle[-1]
            del idle[-1]
            self._idle_count -= 1
        else:
            outgoing = self._made(server)
        outgoing.query = query
        outgoing.uses += 1
        outgoing.identifier = self._drawn.pop()
        return outgoing

    def give(self, outgoing: Outgoing[Q]) -> None:
        """Return a socket whose query has been answered. It may serve another one."""
        is_fresh = outgoing.uses < MAX_USES and outgoing.generation == self._generation and not outgoing.strange
        if is_fresh and (self._idle_count < self._room or self._more_room()):
            outgoing.query = None
            server = outgoing.server
            self._idle.setdefault((server.host, server.port, server.scope), []).append(outgoing)
            self._idle_count += 1
        else:
            self.discard(outgoing)

    def discard(self, outgoing: Outgoing[Q]) -> None:
        """Close a socket: an answer that comes late is nobody's."""
        if outgoing.query is None:
            server = outgoing.server
            idle = self._idle.get((server.host, server.port, server.scope), [])
            if outgoing in idle:
                idle.remove(outgoing)
                self._idle_count -= 1
        outgoing.query = None
        self._own.discard(outgoing.local)
        self._loop.close(outgoing.sock)

    def close_idle(self) -> None:
        """Close those that serve no query; those that do will serve no other one."""
        self._generation += 1
        idle, self._idle = self._idle, {}
        self._idle_count = 0
        for some in idle.values():
            for outgoing in some:
                self._own.discard(outgoing.local)
                self._loop.close(outgoing.sock)
        self._descriptors.give(SPARE, self._room)
        self._room = 0

    def _made(self, server: Destination) -> Outgoing[Q]:
        sock = socket.socket(server.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            # The kernel takes a random port of ip_local_port_range for a socket that is not bound. Nothing can arrive
            # before the peer is set as well.
            sock.connect(server.sockaddr)
            host, port = sock.getsockname()[:2]
            outgoing = Outgoing[Q](sock, server, (host, port), self._generation)
            self._loop.watch(sock.fileno(), EPOLLIN, partial(self._on_readable, outgoing))
        except OSError:
            sock.close()
            raise
        self._own.add(outgoing.local)
        if not self._is_timed:
            self._is_timed = True
            self._loop.later(LIFE_SECONDS, self._grow_old)
        return outgoing

    def _more_room(self) -> bool:
        if self._room >= self._most_idle or not self._descriptors.take(SPARE):
            return False
        self._room += 1
        return True

    def _grow_old(self) -> None:
        self._is_timed = False
        if self._own:
            self._is_timed = True
            self._loop.later(LIFE_SECONDS, self._grow_old)
            self.close_idle()
