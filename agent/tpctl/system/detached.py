"""Processes that outlive the command that started them: its terminal, its session, and being killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

from tpctl.system.errors import ApplyError

_FIRST_FREE = 3
_EXEC_FAILED = 127


def start(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start a program in a session of its own, in the caller's namespaces, without any of the caller's descriptors.

    It belongs to the first process of the PID namespace. Raises ApplyError when it cannot be started.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _child(argv, environment, writing)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as report:
        failure = report.read().decode(errors="replace")  # ends when the program runs, or nobody is left to run it
    if failure:
        raise ApplyError(f"{argv[0]} cannot be started: {failure}")


def _child(argv: Sequence[str], environment: Mapping[str, str], report: int) -> None:
    """What the forked process does; never comes back."""
    try:
        os.setsid()
        if os.fork():  # the leader goes, so that the program can never acquire a terminal
            os._exit(0)
        os.chdir("/")
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a caller that holds a lock holds them back
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(_FIRST_FREE):
            os.dup2(nothing, descriptor)
        os.closerange(_FIRST_FREE, report)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        os.execve(argv[0], list(argv), dict(environment))  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(report, (error.strerror or "unknown error").encode())
    finally:
        os._exit(_EXEC_FAILED)
