"""The one door to other programs: fixed PATH and locale, no shell, a time limit, errors that keep what was printed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.errors import ApplyError

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": SEARCH_PATH, "LC_ALL": "C"}
TIMEOUT_SECONDS = 60.0
INHERITED: set[int] = set()
"""Descriptors of locks: they stay held until the last program that was started under them has ended."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended by itself."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.exit_code == 0

    def failure(self) -> str:
        """One line on what it did and what it printed, for an error message."""
        said = " ".join((self.stderr or self.stdout).split()) or "it printed nothing"
        return f"{' '.join(self.argv)} exited with {self.exit_code}: {said}"


def run(argv: Sequence[str], *, stdin: str | None = None, timeout: float = TIMEOUT_SECONDS) -> Finished:
    """Run a program to its end. `timeout` is in seconds.

    Raises FileNotFoundError when it does not exist, ApplyError when it cannot be started, or does not end in time (it
    is killed).
    """
    try:
        with _input(stdin) as source:
            done = subprocess.run(  # noqa: S603 - a list, never a shell; found in a fixed PATH
                list(argv),
                stdin=source,
                capture_output=True,
                text=True,
                errors="replace",
                env=ENVIRONMENT,
                timeout=timeout,
                check=False,
                pass_fds=tuple(INHERITED),
            )
    except subprocess.TimeoutExpired as late:
        raise ApplyError(f"{' '.join(argv)} did not end within {timeout:g} s and was killed") from late
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ApplyError(f"{argv[0]} cannot be started: {error.strerror}") from error
    return Finished(tuple(argv), done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def _input(text: str | None) -> Iterator[int]:
    """A descriptor to read `text` from. No pipe: of a writer that is killed, the reader would take a part for all."""
    if text is None:
        yield subprocess.DEVNULL
        return
    with os.fdopen(os.memfd_create("tpctl"), "w+b") as file:
        file.write(text.encode())
        file.seek(0)
        yield file.fileno()
