"""An event loop on epoll: readiness of sockets, and timers. One thread.

An exception of a handler or timer ends neither the loop nor anything else but what it was about: see `Loop.contain`.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tpctl.relay.loop.bare_socket import Socket

Handler = Callable[[int], None]
"""Called with the event mask of epoll_ctl(2)."""
Report = Callable[[Exception, Callable[..., object]], None]
"""Told of an exception, and of what has raised it."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""What the kernel says for want of descriptors or memory: it may go well a moment later."""
_MAX_EVENTS = 256
_PAUSE_SECONDS = 0.1
"""After an error of epoll_wait(2) itself, lest it is called over and over."""


def shrink(table: dict[Any, Any]) -> None:
    """Give back the room of what has gone from a dictionary. It does so itself only when it would grow."""
    kept = dict(table)
    table.clear()
    table.update(kept)


def _unwrapped(action: Any) -> tuple[Callable[..., object], list[Any]]:
    """A function or method, and the arguments that `partial` has bound to it."""
    arguments: list[Any] = []
    while isinstance(action, partial):
        action, arguments = action.func, [*action.args, *arguments]
    return action, arguments


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

    def __init__(self, report: Report | None = None) -> None:
        """Without `report`, exceptions of handlers and timers are raised by `run`."""
        self._report = report
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = itertools.count()
        self._afterwards: list[Callable[[], object]] = []
        self._running = False
        self._is_shared = False

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call `handler` when `fd` is ready, and no other one any more; errors and hang-ups are always reported.

        With EPOLLET in `mask`, only when it has become ready.
        """
        if fd in self._handlers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def change(self, fd: int, mask: int) -> None:
        """Wait for other events of a watched fd."""
        self._epoll.modify(fd, mask)

    def hand_over(self, fd: int, handler: Handler) -> None:
        """Call another handler for a watched fd, without a system call."""
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching; harmless when `fd` is not watched."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def close(self, sock: Socket) -> None:
        """Forget a socket and close it.

        The descriptor stays open until the present batch of events is done: reused at once, it would receive events
        that were meant for its predecessor.
        """
        self.forget(sock.fileno())
        self._afterwards.append(sock.close)

    def hang_up(self, sock: Socket) -> None:
        """Close a socket of which no other process has a descriptor: one system call instead of two.

        The kernel forgets what nobody has open any more (epoll(7)). As long as somebody has, it would go on to tell of
        it, by a number that is another socket's by then.
        """
        if self._is_shared:
            self.close(sock)
        else:
            self._handlers.pop(sock.fileno(), None)
            self._afterwards.append(sock.close)

    def share(self) -> None:
        """Another process is about to get all descriptors of this one, and keeps them until `be_alone`."""
        self._is_shared = True
        for action in self._afterwards:
            sock = getattr(action, "__self__", None)
            if isinstance(sock, Socket):
                with contextlib.suppress(OSError):
                    self._epoll.unregister(sock.fileno())

    def be_alone(self) -> None:
        """It has them no more."""
        self._is_shared = False

    def afterwards(self, action: Callable[[], object]) -> None:
        """Do something after the present batch of events, when the sockets closed before this call are closed.

        So what is said of them, in a log line for example, is true for whoever reads it.
        """
        self._afterwards.append(action)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Do something in so many seconds."""
        timer = Timer(action)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), timer))
        return timer

    def every(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something again and again, so many seconds after it was done, whatever comes of it. Not at once."""

        def again() -> None:
            try:
                self.attempt(action)
            finally:
                self.later(seconds, again)

        self.later(seconds, again)

    def stop(self) -> None:
        """Return from `run` after the present batch of events."""
        self._running = False

    def run(self) -> None:
        """Handle events until `stop`."""
        self._running = True
        handlers = self._handlers
        while self._running:
            for fd, mask in self._poll():
                handler = handlers.get(fd)
                if handler is not None:
                    try:
                        handler(mask)
                    except Exception as error:  # noqa: BLE001 - contained
                        self.contain(error, handler)
            handler = None  # which would keep the last connection while nothing happens
            if self._timers:
                self._expire()
            if self._afterwards:
                self._finish_batch()

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something, and contain an exception."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - contained
            self.contain(error, action)

    def contain(self, error: Exception, action: Callable[..., object]) -> None:
        """Report an unexpected exception of `action`, and end what it was about.

        That is the object whose method `action` is, or the first argument of a function. It says by `break_off(error)`
        how it ends: a connection is reset, a query refused, a listener pauses. Further arguments that `partial` has
        bound follow.
        """
        if self._report is None:
            raise error
        method, arguments = _unwrapped(action)
        subject = getattr(method, "__self__", None)
        if subject is None and arguments:
            subject, *arguments = arguments
        break_off = getattr(subject, "break_off", None)
        try:
            self._report(error, method)
            if break_off is not None:
                break_off(error, *arguments)
        except Exception as another:  # noqa: BLE001 - contained
            self._report(another, break_off or method)

    def let_go(self) -> None:
        """Give back the room of handlers that have gone."""
        shrink(self._handlers)

    def release(self) -> None:
        """Close what is left of the loop itself."""
        self._finish_batch()
        self._epoll.close()

    def _poll(self) -> list[tuple[int, int]]:
        """What has happened, or nothing when the time of the next timer has come."""
        try:
            return self._epoll.poll(self._patience(), _MAX_EVENTS)
        except OSError as error:
            self.contain(error, self._epoll.poll)
            time.sleep(_PAUSE_SECONDS)
            return []

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
                self.attempt(action)

    def _finish_batch(self) -> None:
        actions, self._afterwards = self._afterwards, []
        for action in actions:
            with contextlib.suppress(OSError):  # whatever close(2) says, the descriptor is free
                action()
