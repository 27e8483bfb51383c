"""What a command prints to: a full disk, a lost terminal or a reader that has seen enough stops no command half-way.

Whatever cannot be written is dropped, and the first reason kept. `tpctl.cli.main` judges it in the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

from tpctl.system.text import printable

STANDARD = (0, 1, 2)


class Stream:
    """A text stream that fails no more than once, and then silently: what is printed after that goes to nobody.

    Names from the host may be in any text: what is no printable sign is written out (`tpctl.system.text`), and so is
    what the stream's encoding does not have.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self.error: OSError | None = None
        self.is_report = False
        """Whether what is printed tells of something that is done, and is not all that the command is for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop, some text."""
        if self.error is None:
            try:
                self._stream.write(printable(text))
                return len(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write, or drop, what is buffered."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        # What is buffered would be tried once more when the interpreter ends, with an exit code of its own.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, self._stream.fileno())
            os.close(null)


class Streams:
    """stdout and stderr of a command, for as long as it runs."""

    def __init__(self) -> None:
        self._before = sys.stdout, sys.stderr
        self._out = Stream(sys.stdout) if sys.stdout else None
        sys.stdout = self._out
        sys.stderr = Stream(sys.stderr) if sys.stderr else None

    def release(self) -> None:
        """Let the command see what becomes of its output."""
        sys.stdout, sys.stderr = self._before

    @property
    def is_report(self) -> bool:
        """Whether the command has done something, which stands even if nobody can be told."""
        return self._out is not None and self._out.is_report

    def failure(self) -> str | None:
        """Why the result could not be printed; None when it was, or when whoever read has seen enough."""
        if self._out is None:
            return None
        self._out.flush()
        error = self._out.error
        return None if error is None or error.errno == errno.EPIPE else str(error.strerror)


def fill_gaps() -> None:
    """Open /dev/null for each standard stream that is closed: a record or lock must not get such a number.

    Programs and libraries write their messages to number 2, whatever that is.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):  # opened in order, the lowest free number is this one
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def done() -> None:
    """To be called when the command has changed the host: that stands, whatever becomes of the report on it."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.is_report = True
