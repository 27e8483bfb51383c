"""Starting Envoy as a child of this process, and what it says."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from tpctl.system import text
from tpctl.system.log import write_through

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""
_PIPE_BYTES = 1024 * 1024
"""What Envoy may say while nobody listens: when the pipe is full, it waits. /proc/sys/fs/pipe-max-size allows it."""
_MAX_LINE = 1000
"""Characters: of a file that it cannot read, Envoy prints all."""
_MAX_UNFINISHED = 1024 * 1024
_KEPT_LINES = 5
_PATIENCE_SECONDS = 0.5
"""For the thread to hear what Envoy has said already."""
_LEVELS = {"critical": "error", "error": "error", "warning": "warning"}
LOG_FORMAT = "%l|%n|%v"
"""Level, logger and text, as `Voice` takes them apart."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


def start(argv: Sequence[str], said: int) -> int:
    """Start a program that writes what it says to a descriptor, and ends when this process does; its pid.

    Raises OSError when there is no room for another process.
    """
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become(argv, said, parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, which may have been a moment ago (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _become(argv: Sequence[str], said: int, parent: int) -> NoReturn:
    """What the forked process does; never comes back."""
    try:
        end_with(parent)
        os.setpgid(0, 0)  # a terminal's Ctrl-C is for the supervisor, which lets connections finish
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):  # those that nobody may handle
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # there are private keys in its memory
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.execve(argv[0], list(argv), ENVIRONMENT)  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(said, f"critical|main|{argv[0]} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


class Voice:
    """Takes what Envoy says into this process's log, which waits for nobody.

    In a thread: while the pipe is full, Envoy's workers wait.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._last: list[str] = []
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="envoy's log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Envoy has ended: wait until the rest is heard."""
        os.close(self.writer)
        self._thread.join(_PATIENCE_SECONDS)

    def let_go(self) -> None:
        """In a forked process, which does not listen and must not keep the pipe open."""
        for descriptor in (self._reader, self.writer):
            os.close(descriptor)

    def last(self, *, about: str = "") -> str:
        """The last line in which a word occurs, for which it waits a little; empty without one."""
        with self._heard:
            self._heard.wait_for(lambda: self._found(about), _PATIENCE_SECONDS)
            return self._found(about)

    def _found(self, about: str) -> str:
        return next((line for line in reversed(self._last) if about in line), "")

    def forget(self) -> None:
        """What was said until now is not what is asked for next."""
        with self._heard:
            self._last.clear()

    def _listen(self) -> None:
        rest = b""
        while part := os.read(self._reader, 1 << 16):
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > _MAX_UNFINISHED:
                rest = rest[:_MAX_LINE]
            self._take(lines)
        os.close(self._reader)

    def _take(self, lines: list[bytes]) -> None:
        """Lines of the access log are lines of JSON already."""
        if access := [line for line in lines if line.startswith(b"{")]:
            write_through(text.decoded(b"\n".join([*access, b""])))
        for line in lines:
            if line and not line.startswith(b"{"):
                self._say(text.decoded(line))

    def _say(self, line: str) -> None:
        level, logger, words = taken_apart(line)
        if words:
            with self._heard:
                self._last = [*self._last[1 - _KEPT_LINES :], words]
                self._heard.notify_all()
            getattr(self._log, _LEVELS.get(level, "info"))(f"envoy: {words}", logger=logger)


def taken_apart(line: str) -> tuple[str, str, str]:
    """Level, logger and words of a line. What is none of Envoy's log, such as the trace of a crash, is an error.

    >>> taken_apart("warning|config|it was refused\\\\n")
    ('warning', 'config', 'it was refused')
    >>> taken_apart("Segmentation fault")
    ('error', '', 'Segmentation fault')
    """
    parts = line.split("|", 2)
    if len(parts) < 3:
        level, logger, words = "error", "", line
    else:
        level, logger, words = parts
    words = " ".join(text.on_one_line(words.replace("\\n", " ")).split())
    return level, logger, words if len(words) <= _MAX_LINE else f"{words[:_MAX_LINE]}…"


def arguments(envoy: str, config: str, options: Mapping[str, object]) -> list[str]:
    """The command line of an Envoy that one process starts and stops."""
    given = {"--config-path": config, "--log-level": "warning", "--log-format": LOG_FORMAT, **options}
    words = [envoy, "--disable-hot-restart", "--log-format-escaped", "--drain-strategy", "immediate"]
    return [*words, *(word for name, value in given.items() for word in (name, str(value)))]


def exit_in_words(status: int) -> str:
    """Of what a child has died, by its wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"it exited with {code}"
    return f"it was ended by {signal.Signals(-code).name}"
