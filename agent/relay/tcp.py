"""Accepts connections and decides what each of them is passed on to."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from select import EPOLLIN
from typing import TYPE_CHECKING

from agent.relay import dials
from agent.relay.complaints import Complaints
from agent.relay.connection import Connection, Context, Link
from agent.relay.dials import Dial, Role, SelfDialGuard
from agent.relay.loop import Timer
from agent.relay.original_destination import Destination, recover, unmapped

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_BATCH = 64
"""Connections accepted an event, so that a burst does not starve the ones that exist."""
_PAUSE_SECONDS = 0.1
_ATTEMPT_SECONDS = 3.0
"""For one of several upstreams of a virtual address."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TcpRelay:
    """The TCP side of one worker."""

    def __init__(
        self,
        context: Context,
        guard: SelfDialGuard,
        virtual: Callable[[Destination], Sequence[Destination] | None],
        log: FilteringBoundLogger,
        *,
        access_log: bool = False,
    ) -> None:
        self._context = context
        self._guard = guard
        self._virtual = virtual
        self._log = log
        self._complaints = Complaints(log)
        self._access_log = access_log
        self._listeners: dict[int, tuple[socket.socket, Role]] = {}
        self._pause: Timer | None = None
        self._connections: set[Connection] = set()
        self.idle: Callable[[], None] | None = None
        """Called whenever the last connection has ended."""

    @property
    def busy(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def listen(self, listener: socket.socket, role: Role) -> None:
        """Accept the connections of a listener."""
        self._listeners[listener.fileno()] = (listener, role)
        self._context.loop.watch(listener.fileno(), EPOLLIN, partial(self._accept, listener, role))

    def drain(self) -> None:
        """Accept what waits already, and then nothing more."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for listener, role in self._listeners.values():
            while self._accept_one(listener, role):
                pass
            self._context.loop.close(listener)
        self._listeners.clear()

    def reset(self) -> None:
        """End every connection at once."""
        for connection in tuple(self._connections):
            connection.reset(OSError(errno.ESHUTDOWN, "the relay ends"))

    def _accept(self, listener: socket.socket, role: Role, _mask: int) -> None:
        for _ in range(_BATCH):
            if not self._accept_one(listener, role):
                return

    def _accept_one(self, listener: socket.socket, role: Role) -> bool:
        """Whether another connection may be waiting."""
        try:
            client, peer = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._complaints.warn("out of resources, accepting is paused", reason=error.strerror)
                self._rest()
                return False
            return True  # the client has gone already (accept(2))
        try:
            self._relay(client, peer, role)
        except OSError:
            client.close()
        return True

    def _rest(self) -> None:
        """Stop accepting for a moment: the waiting connections would wake the loop over and over."""
        if self._pause is None:
            for fd in self._listeners:
                self._context.loop.change(fd, 0)
            self._pause = self._context.loop.later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._pause = None
        for fd in self._listeners:
            self._context.loop.change(fd, EPOLLIN)

    def _relay(self, client: socket.socket, peer: tuple[str, int], role: Role) -> None:
        destination = recover(client, peer[0])
        route = self._route(destination, peer, role)
        if not route:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            client.close()
            return
        done: Callable[[Connection], None] = self._forget
        if self._access_log:
            done = partial(self._report, role, unmapped(peer[0]), destination, time.monotonic())
        connection = Connection(self._context, client, route, done)
        self._connections.add(connection)
        try:
            connection.start(_ATTEMPT_SECONDS)
        except OSError as error:
            connection.reset(error)

    def _route(self, destination: Destination, peer: tuple[str, int], role: Role) -> Sequence[Dial]:
        """What to dial, best first; nothing when the connection must be refused."""
        if Link(unmapped(peer[0]), peer[1], destination) in self._context.own_dials:
            self._complaints.warn(
                "refused: the relay's own connections come back to it; does it run as the policy's data plane user?",
                destination=str(destination),
            )
            return ()
        if self._guard.refuses(destination):
            self._complaints.warn(
                "refused: a connection to the relay's own port, which nobody redirected",
                role=str(role),
                client=unmapped(peer[0]),
                destination=str(destination),
            )
            return ()
        if role is Role.INBOUND:
            return dials.inbound(destination)
        upstreams = self._virtual(destination)
        return dials.outbound(destination) if upstreams is None else self._virtual_route(destination, upstreams)

    def _virtual_route(self, destination: Destination, upstreams: Sequence[Destination]) -> Sequence[Dial]:
        """The upstreams of a virtual address, which is never dialled itself: nobody has it."""
        others = self._guard.others(upstreams)
        if not others:
            self._complaints.warn(
                "refused: the virtual address has no upstream for this port", destination=str(destination)
            )
        return tuple(Dial(upstream) for upstream in others)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self.idle is not None:
            self.idle()

    def _report(
        self, role: Role, client: str, destination: Destination, started: float, connection: Connection
    ) -> None:
        sent, received = connection.moved
        self._log.info(
            "connection",
            role=str(role),
            client=client,
            destination=str(destination),
            sent=sent,
            received=received,
            seconds=round(time.monotonic() - started, 6),
            error=connection.error.strerror if connection.error else None,
        )
        self._forget(connection)
