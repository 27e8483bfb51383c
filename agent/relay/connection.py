"""One relayed connection: dialling, two flows, half-close, and what happens when either end breaks."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import NamedTuple

from agent.relay.dials import Dial
from agent.relay.loop import Loop, Timer
from agent.relay.original_destination import Destination
from agent.relay.pump import DONE, READ, WRITE, Flow, PipePool

IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h: choose the source port at connect(), so that every destination has all ports for itself."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_UNWATCHED = -1


class Link(NamedTuple):
    """Both ends of a connection. Neither alone tells one from another: ports are shared between destinations."""

    host: str
    port: int
    destination: Destination


class Context(NamedTuple):
    """What all connections of a worker share."""

    loop: Loop
    pool: PipePool
    buffer: memoryview
    own_dials: set[Link]
    """The connections this worker has opened itself."""
    missing_source: Callable[[str], None]
    """Told when an address to dial from does not exist on this host."""


class Connection:
    """Relays between a client that was accepted and the first of several dials that succeeds."""

    __slots__ = (
        "_attempt", "_attempt_seconds", "_client", "_client_mask", "_context", "_dials", "_done", "_down",
        "_link", "_timer", "_up", "_upstream", "_upstream_mask", "error",
    )  # fmt: skip

    def __init__(
        self, context: Context, client: socket.socket, dials: Sequence[Dial], done: Callable[[Connection], None]
    ) -> None:
        self._context = context
        self._client = client
        self._dials = dials
        self._done: Callable[[Connection], None] | None = done
        self._attempt_seconds: float | None = None
        self._attempt = 0
        self._upstream: socket.socket | None = None
        self._link: Link | None = None
        self._timer: Timer | None = None
        self._up: Flow | None = None
        self._down: Flow | None = None
        self._client_mask = 0
        self._upstream_mask = EPOLLOUT
        self.error: OSError | None = None
        """Why the connection ended early; None when both sides closed it."""

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed on to the upstream, and to the client."""
        return (self._up.moved if self._up else 0, self._down.moved if self._down else 0)

    def start(self, attempt_seconds: float | None = None) -> None:
        """Dial. The client is not read before somebody can take what it says.

        `attempt_seconds` is how long one dial may take when there is a next one; None leaves it to the kernel.
        """
        self._attempt_seconds = attempt_seconds
        self._client.setblocking(False)
        self._context.loop.watch(self._client.fileno(), 0, self._on_client)
        self._dial_next(OSError(errno.EHOSTUNREACH, "nowhere to dial"))

    def reset(self, error: OSError) -> None:
        """End the connection, both ways, as broken: neither side must take it for complete."""
        if self._done is None:
            return
        self.error = error
        for sock in (self._client, self._upstream):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._close()

    def _dial_next(self, error: OSError) -> None:
        """Try the dials that are left; `error` is why the one before failed."""
        while self._attempt < len(self._dials):
            dial = self._dials[self._attempt]
            self._attempt += 1
            try:
                self._dial(dial)
            except OSError as failed:
                error = failed
                self._hang_up()
            else:
                return
        self.reset(error)

    def _dial(self, dial: Dial) -> None:
        upstream = socket.socket(dial.destination.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._upstream = upstream
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        destination = self._bind(upstream, dial)
        code = upstream.connect_ex(destination.sockaddr)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        host, port = upstream.getsockname()[:2]
        self._link = Link(host, port, destination)
        self._context.own_dials.add(self._link)
        self._upstream_mask = EPOLLOUT
        self._context.loop.watch(upstream.fileno(), EPOLLOUT, self._on_dialled)
        if self._attempt_seconds is not None and self._attempt < len(self._dials):
            self._timer = self._context.loop.later(self._attempt_seconds, self._give_up)

    def _bind(self, upstream: socket.socket, dial: Dial) -> Destination:
        """Choose the source address; returns what to dial from there."""
        if dial.source is None:
            return dial.destination
        try:
            upstream.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            upstream.bind((dial.source, 0))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or dial.substitute is None:
                raise
            self._context.missing_source(dial.source)
            return dial.substitute
        return dial.destination

    def _give_up(self) -> None:
        self._hang_up()
        self._dial_next(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _hang_up(self) -> None:
        """Let go of an attempt."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            self._context.own_dials.discard(self._link)
            self._link = None
        if self._upstream is not None:
            self._context.loop.close(self._upstream)
            self._upstream = None

    def _on_dialled(self, _mask: int) -> None:
        upstream = self._upstream
        assert upstream is not None
        code = upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._hang_up()
            self._dial_next(OSError(code, os.strerror(code)))
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = self._context.loop
        self._up = Flow(self._client, upstream, self._context.buffer, self._context.pool)
        self._down = Flow(upstream, self._client, self._context.buffer, self._context.pool)
        loop.forget(upstream.fileno())
        loop.watch(upstream.fileno(), EPOLLIN, self._on_upstream)
        self._upstream_mask = EPOLLIN
        if self._client_mask == _UNWATCHED:
            loop.watch(self._client.fileno(), EPOLLIN, self._on_client)
        else:
            loop.change(self._client.fileno(), EPOLLIN)
        self._client_mask = EPOLLIN

    def _on_client(self, mask: int) -> None:
        self._client_mask = self._on_event(mask, self._client, self._client_mask, (self._up, self._down))
        self._arm()

    def _on_upstream(self, mask: int) -> None:
        assert self._upstream is not None
        self._upstream_mask = self._on_event(mask, self._upstream, self._upstream_mask, (self._down, self._up))
        self._arm()

    def _on_event(self, mask: int, sock: socket.socket, watched: int, flows: tuple[Flow | None, Flow | None]) -> int:
        """Move what the event allows: `flows` are the one that reads the socket and the one that writes it.

        Returns the mask the socket is watched with.
        """
        reads, writes = flows
        try:
            if mask & EPOLLOUT and writes is not None:
                writes.move()
            if mask & EPOLLIN and reads is not None:
                reads.move()
            elif mask & EPOLLERR:
                # Not being read just now, so nobody else would find the reset.
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET
                raise OSError(code, os.strerror(code))
            elif mask & EPOLLHUP and not mask & EPOLLOUT:
                # Both sides have finished with this socket, but its last bytes wait for the other one. epoll reports
                # that without being asked, and again at once: look away until something is wanted of the socket.
                self._context.loop.forget(sock.fileno())
                return _UNWATCHED
        except OSError as error:
            self.reset(error)
        return watched

    def _arm(self) -> None:
        """Wait for what the flows wish; close when they wish nothing."""
        up, down = self._up, self._down
        if self._done is None or up is None or down is None:
            return
        if up.wish is DONE and down.wish is DONE:
            self._close()
            return
        client = (EPOLLIN if up.wish is READ else 0) | (EPOLLOUT if down.wish is WRITE else 0)
        if client != self._client_mask:
            self._client_mask = self._watch(self._client, self._client_mask, client, self._on_client)
        upstream = (EPOLLIN if down.wish is READ else 0) | (EPOLLOUT if up.wish is WRITE else 0)
        if upstream != self._upstream_mask:
            assert self._upstream is not None
            self._upstream_mask = self._watch(self._upstream, self._upstream_mask, upstream, self._on_upstream)

    def _watch(self, sock: socket.socket, watched: int, wanted: int, handler: Callable[[int], None]) -> int:
        if watched != _UNWATCHED:
            self._context.loop.change(sock.fileno(), wanted)
        elif wanted:
            self._context.loop.watch(sock.fileno(), wanted, handler)
        else:
            return _UNWATCHED
        return wanted

    def _close(self) -> None:
        if self._done is None:
            return
        done, self._done = self._done, None
        for flow in (self._up, self._down):
            if flow is not None:
                flow.abandon()
        self._hang_up()
        self._context.loop.close(self._client)
        done(self)
