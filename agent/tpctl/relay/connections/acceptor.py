"""Accepts the connections of a worker's listening sockets, and stops for a while when there are too many."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable
from functools import partial
from select import EPOLLIN
from typing import Any

from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.loop import EXHAUSTED, Loop, Timer

_BATCH = 8
"""Connections accepted an event, so that a burst does not hold up those that exist, and other workers get a part."""
_PAUSE_SECONDS = 0.1
LIMIT_REACHED = "the limit of connections is reached"
OUT_OF_ROOM = "out of resources, accepting is paused"
_WATCHED = EPOLLIN | select.EPOLLEXCLUSIVE
"""Several workers may wait for one socket: a connection wakes one of them. Such a watch cannot be changed."""


class Acceptor:
    """Hands every accepted socket on, with its peer's name and the name of the listener."""

    def __init__(
        self,
        loop: Loop,
        complaints: Complaints,
        accepted: Callable[[Socket, Any, str], None],
        is_full: Callable[[str], str | None],
    ) -> None:
        """`is_full` says why no further connection may be accepted for a listener, and None when one may."""
        self._loop = loop
        self._complaints = complaints
        self._accepted = accepted
        self._is_full = is_full
        self._sockets: dict[Socket, str] = {}
        self._families: dict[Socket, int] = {}
        self._resting: set[Socket] = set()
        self._pause: Timer | None = None
        self.paused: Callable[[], None] | None = None
        """Called when accepting is paused."""

    def listen(self, sock: Socket, name: str) -> None:
        """Accept the connections of a listening socket. Once more for the same socket, to give it another name."""
        is_new = sock not in self._sockets
        self._sockets[sock] = name
        self._families[sock] = int(sock.family)
        if is_new:
            self._watch(sock)

    def leave(self, sock: Socket) -> None:
        """Accept no more of its connections; they wait for whoever else has the socket. It is closed here."""
        self._sockets.pop(sock)
        self._families.pop(sock)
        self._resting.discard(sock)
        self._loop.close(sock)

    def drain(self) -> None:
        """Accept what waits already, and then nothing more."""
        for sock in tuple(self._sockets):
            while self._accept_one(sock):
                pass
            self.leave(sock)

    def stop(self) -> None:
        """Accept nothing more; what waits is for whoever else has the sockets."""
        for sock in tuple(self._sockets):
            self.leave(sock)

    def _watch(self, sock: Socket) -> None:
        self._loop.watch(sock.fileno(), _WATCHED, partial(self._on_waiting, sock))

    def _on_waiting(self, sock: Socket, _mask: int) -> None:
        for _ in range(_BATCH):
            reason = self._is_full(self._sockets[sock])
            if reason is not None:
                self._complaints.warn(reason, listener=self._sockets[sock])
                self._rest((sock,))
                return
            if not self._accept_one(sock):
                return

    def _accept_one(self, sock: Socket) -> bool:
        """Whether another connection may be waiting."""
        try:
            # Not accept(): that converts the family and the type of the listener to enumerations every time.
            descriptor, peer = sock._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._complaints.warn(OUT_OF_ROOM, reason=error.strerror)
                self._rest(self._sockets)
                return False
            return True  # the client has gone already (accept(2))
        client = Socket(self._families[sock], socket.SOCK_STREAM, 0, descriptor)
        try:
            self._accepted(client, peer, self._sockets[sock])
        except OSError:
            client.close()
        except Exception as error:  # noqa: BLE001 - contained
            client.close()
            self._loop.contain(error, self._accepted)
        return True

    def break_off(self, _error: Exception, sock: Socket) -> None:
        """Pause because of an error that nobody expected (`Loop.contain`)."""
        self._rest((sock,))

    def _rest(self, sockets: Iterable[Socket]) -> None:
        """Stop accepting for a moment: the waiting connections would wake the loop over and over."""
        for sock in sockets:
            if sock not in self._resting:
                self._resting.add(sock)
                self._loop.forget(sock.fileno())
        if self.paused is not None:
            self.paused()
        if self._pause is None:
            self._pause = self._loop.later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._pause = None
        for sock in tuple(self._resting):
            try:
                self._watch(sock)
            except OSError as error:
                self._complaints.warn(OUT_OF_ROOM, reason=error.strerror)
                self._pause = self._loop.later(_PAUSE_SECONDS, self._resume)
                return
            self._resting.discard(sock)
