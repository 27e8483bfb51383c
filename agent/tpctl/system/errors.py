"""The few errors tpctl raises, each with the exit code it becomes.

`tpctl.cli.main` is the one place that turns them into a message and an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence


class TpctlError(Exception):
    """Base of every error a user may cause or meet; anything else is a defect of tpctl itself."""

    exit_code = 1


class InputError(TpctlError):
    """The user's input cannot be carried out; nothing was touched.

    `problems` holds one line each: the flag, variable or file and key, the value, and what would be right.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class HostError(TpctlError):
    """The host cannot do what was asked (a missing tool, table or privilege); nothing was touched."""

    exit_code = 2


class ApplyError(TpctlError):
    """A change failed half-way. The message says whether it was rolled back and what the host's state is now."""

    exit_code = 1


class HalfDoneError(ApplyError):
    """A step of a change failed half-way, and could not be taken back either. The message says so."""


INTERNAL = "internal error"
"""How `described` begins for what nobody foresaw."""


def described(error: BaseException) -> str:
    """Any error as the beginning of a message; what is neither ours nor the kernel's is called internal."""
    if isinstance(error, TpctlError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{INTERNAL} ({type(error).__name__}: {error})"
