"""Writes log lines from a thread of its own, so that whoever logs neither waits nor fails.

A write to a log may last for ever: nobody reads the pipe, the terminal is stopped, journald or a file server is gone.
There is no way for a single thread to find out beforehand. O_NONBLOCK belongs to the open file description (open(2)):
it would be set for everybody who shares the terminal or the pipe, and it means nothing for a file. Between a poll(2)
that says there is room and the write, another process may have taken the room.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

MOST_BYTES = 1024 * 1024
"""Of lines that wait to be written. Further ones are dropped."""
_CHUNK = select.PIPE_BUF
"""Bytes a write: several processes may write to one pipe, which keeps so many together (pipe(7))."""
_GATHER_SECONDS = 0.01
"""Between two looks at what has come, so that a hundred lines cost one wake-up."""
_RETRY_SECONDS = 1.0
"""Between two tries to say how many lines were dropped."""
FINISH_SECONDS = 1.0


class LogWriter:
    """A text stream that never blocks and never raises. Every text that is written to it is one or more whole lines.

    The thread is started with the first line, in a forked process too: what waits in its parent is the parent's.
    """

    def __init__(self, descriptor: int, about_dropped: Callable[[int], str]) -> None:
        """`about_dropped` makes the line that says how many were dropped, which is written when that works again."""
        self._descriptor = descriptor
        self._about_dropped = about_dropped
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._idle = threading.Event()
        self._idle.set()
        self._is_running = False
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._untold = 0
        self._is_cut = False
        """Whether the last line was written in part."""

    @property
    def dropped(self) -> int:
        """How many lines this process has dropped."""
        return self._dropped

    def write(self, text: str) -> int:
        """Have a text written, or drop it."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._size + len(data) > MOST_BYTES or not (self._is_running or self._start()):
                self._drop(1)
                return len(text)
            self._lines.append(data)
            self._size += len(data)
            is_asleep = self._idle.is_set()
            if is_asleep:
                self._idle.clear()
        if is_asleep:
            self._wake.release()
        return len(text)

    def flush(self) -> None:
        """Nothing: see `finish`."""

    def finish(self, seconds: float = FINISH_SECONDS) -> bool:
        """Wait until everything is written, but not for longer than this; whether it is.

        To be called before the process ends.
        """
        return self._idle.wait(seconds)

    def _start(self) -> bool:
        """Whether there is a thread. There may be no room for one now, and be later."""
        with contextlib.suppress(RuntimeError, MemoryError):
            threading.Thread(target=self._run, name="log", daemon=True).start()
            self._is_running = True
        return self._is_running

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        self._untold += lines

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            self._wake.acquire(timeout=_RETRY_SECONDS if self._untold else None)
            try:
                while self._write_waiting():
                    time.sleep(_GATHER_SECONDS)
            except MemoryError:
                time.sleep(_RETRY_SECONDS)

    def _write_waiting(self) -> bool:
        """Write what waits; hands back whether more has come meanwhile."""
        with self._lock:
            lines, self._lines = self._lines, []
        for begin, end in chunks([len(line) for line in lines]):
            self._write_lines(lines[begin:end])
        if self._untold:
            self._tell()
        with self._lock:
            if not self._lines:
                self._idle.set()
            return bool(self._lines)

    def _write_lines(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        missing = self._put(data)
        with self._lock:
            self._size -= len(data)
            self._drop(incomplete(lines, len(data) - missing))

    def _tell(self) -> None:
        """Say how many lines were dropped."""
        told = self._untold
        if not self._put(self._about_dropped(told).encode(errors="backslashreplace")):
            with self._lock:
                self._untold -= told

    def _put(self, data: bytes) -> int:
        """Write; hands back how many of the last bytes could not be written."""
        whole = b"\n" + data if self._is_cut else data
        written = 0
        while written < len(whole):
            try:
                written += os.write(self._descriptor, memoryview(whole)[written:])
            except BlockingIOError:  # somebody who shares it has set O_NONBLOCK
                wait_for_room(self._descriptor)
            except OSError:
                break
        if written:
            self._is_cut = whole[written - 1 : written] != b"\n"
        return min(len(whole) - written, len(data))


def wait_for_room(descriptor: int) -> None:
    """Wait until a descriptor can be written to, or is broken."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    waiting.poll()


def chunks(sizes: list[int], most: int = _CHUNK) -> list[tuple[int, int]]:
    """Where to divide lines of these sizes so that no part is longer than `most`, unless a single line is.

    >>> chunks([3, 3, 3, 9, 1], 6)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    found, begin, size = [], 0, 0
    for at, one in enumerate(sizes):
        if at > begin and size + one > most:
            found.append((begin, at))
            begin, size = at, 0
        size += one
    return [*found, (begin, len(sizes))] if sizes else []


def incomplete(lines: list[bytes], written: int) -> int:
    """How many of these lines are not among the first bytes that were written.

    >>> incomplete([b"ab", b"cd", b"ef"], 3)
    2
    """
    for at, line in enumerate(lines):
        if written < len(line):
            return len(lines) - at
        written -= len(line)
    return 0
