"""A TLS handshake as events of the loop."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT

from tpctl.relay.connections.ends import TlsEnd
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.failures import shown
from tpctl.relay.loop.loop import Loop


class Handshake:
    """Calls `done` once: with None when the handshake is complete, else with what is wrong."""

    __slots__ = ("_done", "_loop", "_socket", "end")

    def __init__(self, loop: Loop, sock: Socket, end: TlsEnd, done: Callable[[OSError | None], None]) -> None:
        self._loop = loop
        self._socket = sock
        self._done: Callable[[OSError | None], None] | None = done
        self.end = end

    def start(self) -> None:
        """Begin it; `done` may be called at once."""
        try:
            self._socket.setblocking(False)
            self._loop.watch(self._socket.fileno(), EPOLLIN, self._on_event)
        except OSError as error:
            self.finish(error)
        else:
            self._on_event(0)

    def expire(self) -> None:
        """It has had its time."""
        self.finish(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def finish(self, error: OSError | None) -> None:
        """It is over; the socket is no longer watched."""
        if self._done is not None:
            done, self._done = self._done, None
            self._loop.forget(self._socket.fileno())
            done(error)

    def break_off(self, error: Exception, *_arguments: object) -> None:
        """Fail because of an error that nobody expected (`Loop.contain`)."""
        self.finish(OSError(errno.EIO, shown(error)))

    def _on_event(self, _mask: int) -> None:
        try:
            if self.end.handshake():
                self.finish(None)
                return
            unsent = not self.end.flush()
        except OSError as error:
            self.finish(error)
            return
        self._loop.change(self._socket.fileno(), EPOLLIN | (EPOLLOUT if unsent else 0))
