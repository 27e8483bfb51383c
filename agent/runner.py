"""The one door to other programs: fixed PATH and locale, no shell, a time limit, errors that keep what was printed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from agent.errors import ApplyError

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": SEARCH_PATH, "LC_ALL": "C"}
TIMEOUT_SECONDS = 60.0


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

    Raises FileNotFoundError when it does not exist, ApplyError when it does not end in time (it is killed).
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise ApplyError(f"{' '.join(argv)} did not end within {timeout:g} s and was killed") from late
    return Finished(tuple(argv), done.returncode, done.stdout, done.stderr)
