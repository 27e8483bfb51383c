"""The one door to other programs: fixed PATH and locale, no shell, a time limit, errors that keep what was printed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tpctl.system import text
from tpctl.system.errors import ApplyError

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": SEARCH_PATH, "LC_ALL": "C"}
TIMEOUT_SECONDS = 60.0
INHERITED: set[int] = set()
"""Descriptors of locks: they stay held until the last program that was started under them has ended."""


class Finished(NamedTuple):
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


def run(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    timeout: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Finished:
    """Run a program to its end. `timeout` is in seconds, by default `TIMEOUT_SECONDS`.

    `variables` are added to the fixed environment. Raises FileNotFoundError when it does not exist, ApplyError when it
    cannot be started, or does not end in time: it is killed then, with what it has started, which would hold the lock.
    """
    seconds = TIMEOUT_SECONDS if timeout is None else timeout
    try:
        with (
            _input(stdin) as source,
            subprocess.Popen(  # noqa: S603 - a list, never a shell; found in a fixed PATH
                list(argv),
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**ENVIRONMENT, **(variables or {})},
                pass_fds=tuple(INHERITED),
                process_group=0,
            ) as program,
        ):
            try:
                said = program.communicate(timeout=seconds)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as late:
        raise ApplyError(f"{' '.join(argv)} did not end within {seconds:g} s and was killed") from late
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ApplyError(f"{argv[0]} cannot be started: {error.strerror}") from error
    return Finished(tuple(argv), program.returncode, *map(text.decoded, said))


@contextlib.contextmanager
def _input(content: str | None) -> Iterator[int]:
    """A descriptor to read from. No pipe: of a writer that is killed, the reader would take a part for all."""
    if content is None:
        yield subprocess.DEVNULL
        return
    with os.fdopen(os.memfd_create("tpctl"), "w+b") as file:
        file.write(text.encoded(content))
        file.seek(0)
        yield file.fileno()
