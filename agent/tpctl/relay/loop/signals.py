"""Signals as events of a loop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from select import EPOLLIN

from tpctl.relay.loop.loop import Loop


@contextlib.contextmanager
def handled(loop: Loop, handlers: Mapping[int, Callable[[], None]]) -> Iterator[None]:
    """Call a handler, from the loop, whenever its signal has come.

    The handlers of the process do nothing: a signal may come between any two instructions, so the loop reads it from a
    socket when it is ready for it.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)

    def on_signals(_mask: int) -> None:
        for number in reader.recv(4096):
            if number in handlers:
                loop.attempt(handlers[number])

    loop.watch(reader.fileno(), EPOLLIN, on_signals)
    for number in handlers:
        signal.signal(number, lambda _number, _frame: None)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
    try:
        yield
    finally:
        # Held back again: Python ends with the default handlers, and a late SIGTERM would make a failure of a good end.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.set_wakeup_fd(previous)
        loop.forget(reader.fileno())
        reader.close()
        writer.close()
