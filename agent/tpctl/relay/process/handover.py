"""Starting a successor that takes the listening sockets over, so that a restart refuses and resets nothing.

The sockets themselves are passed on, with the connections that wait in them. Two processes that overlap by SO_REUSEPORT
would each have queues of their own: those of the one that ends are reset (tcp_migrate_req, off by default, aside).
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from select import EPOLLIN

from tpctl.relay.connections.sockmap import VARIABLE, Sockmap
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process.activation import FIRST, Inherited, environment

PREDECESSOR = "TPCTL_RELAY_PREDECESSOR"
"""The descriptor on which a successor says that it serves."""
_READY = b"1"
_MAX_WORD = 1024
_PATIENCE_SECONDS = 120.0
"""For a successor to serve."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def announce_readiness() -> None:
    """Tell the process that started this one that it can go; nothing without one."""
    descriptor = os.environ.pop(PREDECESSOR, "")
    if descriptor.isdecimal():
        with suppress(OSError):
            os.write(int(descriptor), _READY)
            os.close(int(descriptor))


class Successor:
    """A process that is being started.

    Calls `ended` once: with its pid when it serves, else with None and the reason.
    """

    def __init__(
        self,
        loop: Loop,
        sockets: Sequence[Inherited],
        ended: Callable[[int | None, str], None],
        sockmap: Sockmap | None = None,
    ) -> None:
        self._loop = loop
        self._ended = ended
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Until the handlers of this process are gone, which would take a signal and do nothing.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        loop.share()
        self._pid = os.fork()
        if self._pid == 0:
            _become_successor(sockets, writer, sockmap or ())
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(writer)
        loop.watch(self._reader, EPOLLIN, self._on_word)
        self._timer = loop.later(_PATIENCE_SECONDS, self._kill)

    def stop(self) -> None:
        """It is not wanted any more: this process has been told to end."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)

    def _on_word(self, _mask: int) -> None:
        word = os.read(self._reader, _MAX_WORD)
        self._loop.be_alone()
        self._loop.forget(self._reader)
        os.close(self._reader)
        self._timer.cancel()
        if word == _READY:
            self._ended(self._pid, "")
            return
        with suppress(OSError):
            os.waitpid(self._pid, 0)
        self._ended(None, word.decode(errors="replace") or "it has ended before it served")

    def _kill(self) -> None:
        """It does not get anywhere: whoever asks for a restart again must not be told that one is under way."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


def _become_successor(sockets: Sequence[Inherited], writer: int, maps: Sequence[int]) -> None:
    """What the forked process does; never comes back."""
    try:
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.set_wakeup_fd(-1)
        # First out of the way of the numbers that they will have, then to these numbers.
        given = (*(one.socket.fileno() for one in sockets), writer, *maps)
        copies = [_copy_above(number, FIRST + len(given)) for number in given]
        writer = copies[len(sockets)]
        for at, copy in enumerate(copies):
            os.dup2(copy, FIRST + at, inheritable=True)
        pid = os.getpid()
        after = FIRST + len(sockets)
        variables = {**os.environ, **environment(sockets, pid), PREDECESSOR: str(after)}
        if maps:
            variables[VARIABLE] = ",".join(str(after + 1 + number) for number in range(len(maps)))
        if "WATCHDOG_PID" in variables:
            variables["WATCHDOG_PID"] = str(pid)
        os.execve(sys.executable, sys.orig_argv, variables)  # noqa: S606 - no shell is the point
    except OSError as error:
        # Not to stderr, which may be stuck.
        os.write(writer, f"{sys.executable} cannot be started: {error.strerror}".encode())
    finally:
        os._exit(127)


def _copy_above(number: int, lowest: int) -> int:
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest)
