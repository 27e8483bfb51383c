"""The processes below the server of a scene: those of the command, and those that are meant to outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from tests.netns.relay.net import is_running


def name(process: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def is_detached(process: int) -> bool:
    """Whether it has a session of its own, as the guardian of `--confirm-within` has, and nothing else of tpctl."""
    try:
        return os.getsid(process) != os.getsid(0)
    except ProcessLookupError:
        return False


def attached(but: Container[int]) -> list[int]:
    """Whom this process and its descendants have started, `but` some: all but guardians. The oldest come first.

    A program that tpctl starts has a process group of its own, and whoever has lost its parent is a child of this one.
    """
    running = sorted(_running())
    found: list[int] = []
    generation = {os.getpid()}
    while generation:
        generation = {one for one, parent in running if parent in generation and one not in but}
        found += sorted(one for one in generation if not is_detached(one))
    return found


def children() -> list[int]:
    """Whom this process has started, and whom it got from those."""
    return [process for process, parent in _running() if parent == os.getpid()]


def detached() -> list[int]:
    """The guardians among them: whoever stood between is gone as soon as a guardian runs."""
    return [process for process in children() if is_detached(process)]


def end(processes: Iterable[int]) -> None:
    """Kill them, as far as they are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def reap() -> None:
    """Take leave of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def leave(seconds: float) -> list[str]:
    """Wait until no child is left; hands back the guardians that had to be killed for it."""
    deadline = time.monotonic() + seconds
    reap()
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.02)
        reap()
    said = [_command_line(process) for process in left if is_detached(process)]
    while left:
        end(left)
        time.sleep(0.02)
        reap()
        left = children()
    return said


def _running() -> Iterator[tuple[int, int]]:
    """Every process that has not ended, and its parent."""
    return (one for one in map(_found, Path("/proc").glob("[0-9]*")) if one)


def _found(folder: Path) -> tuple[int, int] | None:
    """A process by its folder (proc_pid_stat(5)); None when it has ended.

    The state that the kernel tells there is that of its first thread.
    """
    try:
        state, parent, *_ = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    process = int(folder.name)
    return (process, int(parent)) if state not in "ZX" or is_running(process) else None


def _command_line(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return "?"
