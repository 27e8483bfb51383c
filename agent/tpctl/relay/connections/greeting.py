"""Reads the PROXY protocol header with which a client begins."""

from __future__ import annotations

import socket
from collections.abc import Callable
from select import EPOLLIN

from tpctl.relay.connections.proxy_protocol import HeaderReader, MalformedHeaderError
from tpctl.relay.connections.route import Refusal
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.loop import Loop

_AT_ONCE = 2048
"""Most headers are shorter; longer ones take several rounds."""


class Greeting:
    """Waits for the header of one client. Calls `done` once, with None or the reason to refuse the client."""

    __slots__ = ("_done", "_loop", "_socket", "reader")

    def __init__(self, loop: Loop, client: Socket, done: Callable[[Refusal | None], None]) -> None:
        self._loop = loop
        self._socket = client
        self._done = done
        self.reader = HeaderReader()

    def start(self) -> None:
        """Begin to listen; `done` may be called at once."""
        try:
            self._socket.setblocking(False)
            self._loop.watch(self._socket.fileno(), EPOLLIN, self._on_bytes)
        except OSError:
            self.end(Refusal.GONE)

    def end(self, why: Refusal | None) -> None:
        """It is over; the socket is no longer watched."""
        self._loop.forget(self._socket.fileno())
        self._done(why)

    def break_off(self, _error: Exception, *_arguments: object) -> None:
        """Refuse the client because of an error that nobody expected (`Loop.contain`)."""
        self.end(Refusal.FAILED)

    def _on_bytes(self, _mask: int) -> None:
        """Look first and take afterwards, so that what follows the header stays in the socket for the relay."""
        try:
            data = self._socket.recv(_AT_ONCE, socket.MSG_PEEK)
            if data:
                self._socket.recv(self.reader.take(data))
        except BlockingIOError:
            return
        except MalformedHeaderError:
            self.end(Refusal.MALFORMED)
            return
        except OSError:
            self.end(Refusal.GONE)
            return
        if not data:
            self.end(Refusal.GONE)
        elif self.reader.header is not None:
            self.end(None)
