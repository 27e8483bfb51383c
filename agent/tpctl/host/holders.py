"""Which processes have a socket open: proc_pid_fd(5). It takes root to see those of others.

The kernel names the user who made a socket. That may be another than the one who uses it: systemd makes sockets for
services, and a daemon binds port 53 as root and then drops its privileges.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tpctl.system import text

_PROC = "/proc"


class Holder(NamedTuple):
    """A descriptor of a process that stands for a socket."""

    inode: int
    process: int
    descriptor: int


class Process(NamedTuple):
    """What a process is."""

    number: int
    uid: int
    """Its fsuid (proc_pid_status(5)), which rules see of the sockets that it opens now."""
    name: str
    """What the kernel calls it: the first 15 bytes of its program's name, or what it has called itself."""
    is_stopped: bool = False
    """Whether a signal has stopped it (SIGSTOP, signal(7))."""


def holders(inodes: Iterable[int]) -> Iterator[Holder]:
    """Every descriptor of every process that stands for one of these sockets."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    if not wanted:
        return
    for entry in os.scandir(_PROC):
        if entry.name.isdecimal():
            for number, target in _open_files(f"{entry.path}/fd"):
                if target in wanted:
                    yield Holder(wanted[target], int(entry.name), number)


def _open_files(folder: str) -> Iterator[tuple[int, str]]:
    """The descriptors of a process and what they stand for; those that are closed meanwhile are left out.

    Without pathlib: a host may have a million of them.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):
            yield int(entry.name), os.readlink(entry.path)  # noqa: PTH115


def processes(inodes: Iterable[int]) -> dict[int, tuple[Process, ...]]:
    """The processes that hold each of these sockets; none for one whose processes cannot be seen."""
    found: dict[int, dict[int, Process]] = {inode: {} for inode in inodes}
    for one in holders(found):
        if one.process not in found[one.inode] and (process := process_of(one.process)):
            found[one.inode][one.process] = process
    return {inode: tuple(held.values()) for inode, held in found.items()}


def process_of(number: int) -> Process | None:
    """A running process; None when there is none of that number."""
    try:
        status = text.read(f"{_PROC}/{number}/status")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.lines(status) if ":" in line)
    try:
        is_stopped = fields["State"].strip("\t").startswith("T")
        return Process(number, int(fields["Uid"].split()[3]), fields["Name"].strip("\t"), is_stopped)
    except (KeyError, IndexError, ValueError):
        return None
