"""An event loop on epoll: readiness of sockets, and timers. One thread, level-triggered."""

from __future__ import annotations

import heapq
import itertools
import select
import socket
import time
from collections.abc import Callable
from typing import Any

Handler = Callable[[int], None]
"""Called with the event mask of epoll_ctl(2)."""

_MAX_EVENTS = 256


def shrink(table: dict[Any, Any]) -> None:
    """Give back the room of what has gone from a dictionary. It does so itself only when it would grow."""
    kept = dict(table)
    table.clear()
    table.update(kept)


class Timer:
    """Something to be done later, unless cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Do nothing when the time comes."""
        self.action = None


class Loop:
    """Calls handlers until told to stop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = itertools.count()
        self._closing: list[socket.socket] = []
        self._running = False

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call `handler` when `fd` is ready, and no other one any more; errors and hang-ups are always reported."""
        if fd in self._handlers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def change(self, fd: int, mask: int) -> None:
        """Wait for other events of a watched fd."""
        self._epoll.modify(fd, mask)

    def forget(self, fd: int) -> None:
        """Stop watching; harmless when `fd` is not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self, sock: socket.socket) -> None:
        """Forget a socket and close it.

        The descriptor stays open until the present batch of events is done: reused at once, it would receive events
        that were meant for its predecessor.
        """
        self.forget(sock.fileno())
        self._closing.append(sock)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Do something in so many seconds."""
        timer = Timer(action)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), timer))
        return timer

    def stop(self) -> None:
        """Return from `run` after the present batch of events."""
        self._running = False

    def run(self) -> None:
        """Handle events until `stop`."""
        self._running = True
        handlers = self._handlers
        while self._running:
            for fd, mask in self._epoll.poll(self._patience(), _MAX_EVENTS):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(mask)
            handler = None  # which would keep the last connection while nothing happens
            if self._timers:
                self._expire()
            if self._closing:
                self._close_all()

    def let_go(self) -> None:
        """Give back the room of handlers that have gone."""
        shrink(self._handlers)

    def release(self) -> None:
        """Close what is left of the loop itself."""
        self._close_all()
        self._epoll.close()

    def _patience(self) -> float:
        """Seconds until the next timer; -1, for ever, without one."""
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1

    def _expire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            action = heapq.heappop(self._timers)[2].action
            if action is not None:
                action()

    def _close_all(self) -> None:
        closing, self._closing = self._closing, []
        for sock in closing:
            sock.close()
