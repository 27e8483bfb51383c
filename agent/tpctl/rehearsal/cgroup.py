"""Control groups of a rehearsal's own, and a place of its own for eBPF programs. Nothing outside them is touched.

A socket belongs to the group that its maker is in at that moment, and stays there. So no helper processes are needed:
enter, create the socket, come back. The groups lie below the one this process is in, so that for whoever watches that
one (systemd ends a scope that is empty) nobody has left.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.host import cgroups
from tpctl.rehearsal.namespaces import own_mounts
from tpctl.spec.policy import Cgroup
from tpctl.system.errors import HostError

if TYPE_CHECKING:
    from tpctl.engines.base import Engine
    from tpctl.spec.engine_options import EngineOptions

NAME = "tpctl-rehearsal"
SERVICE = "app.service"
BELOW = "worker"
"""A group below that of the service."""
_numbers = itertools.count()
_MNT_DETACH = 2
_REMOVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class OwnGroups:
    """What stands for the control groups of a host while this process is in `home`."""

    home: Path
    """The directory of the group this process is in: it is outside of the service's."""
    service: Cgroup
    """Stands for the group of a policy. There is a group below it, `BELOW`."""

    @contextlib.contextmanager
    def inside(self, path: str | None) -> Iterator[None]:
        """Run the block in the group of a path, from the root; None stays at home. Raises HostError."""
        if path is None:
            yield
            return
        directory = cgroups.root() / path
        if not directory.is_relative_to(self.home):
            raise HostError(f"the control group {path} is none of this rehearsal's")
        enter(directory)
        try:
            yield
        finally:
            enter(self.home)


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """Control groups, and a BPF file system, to which the eBPF engine can be confined."""

    groups: OwnGroups
    pins: Path

    @property
    def cgroup(self) -> Path:
        """The directory of the group to which programs are attached."""
        return self.groups.home

    def engine(self, options: EngineOptions | None = None, *, chooses_sockets: bool | None = None) -> Engine[Any]:
        """The eBPF engine for the current network namespace, kept to this place. Raises HostError."""
        from tpctl.engines import registry

        return registry.confined_ebpf(options, top=self.cgroup, pins=self.pins, chooses_sockets=chooses_sockets)


def enter(directory: Path) -> None:
    """Move this process into a control group. Raises HostError."""
    try:
        (directory / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise HostError(f"this process cannot move to the control group {directory}: {error.strerror}") from error


def group(directory: Path) -> Cgroup:
    """The control group of a directory. Raises HostError."""
    return cgroups.find(str(directory.relative_to(cgroups.root())))


@contextlib.contextmanager
def own_groups() -> Iterator[OwnGroups]:
    """Groups of our own, with this process in them for the length of the block. Raises HostError."""
    own = cgroups.of_process("self")
    if own is None:
        raise HostError("the control group of this process is unknown: /proc/self/cgroup does not say")
    before = cgroups.root() / own
    _clear_abandoned(before)
    try:
        home = _made_below(before)
        below = home / SERVICE / BELOW
        below.mkdir(parents=True)
    except OSError as error:
        raise HostError(
            f"the rehearsal needs control groups of its own below {before}, and cannot make them: {error.strerror}"
        ) from error
    try:
        enter(home)
        try:
            yield OwnGroups(home, group(below.parent))
        finally:
            enter(before)
    finally:
        for directory in (below, below.parent, home):
            remove(directory)


def _made_below(directory: Path) -> Path:
    """A new group. Its number may be taken: by a process of the same number in another namespace of processes."""
    while True:
        home = directory / f"{NAME}-{os.getpid()}-{next(_numbers)}"
        try:
            home.mkdir()
        except FileExistsError:
            continue
        return home


@contextlib.contextmanager
def own_place() -> Iterator[OwnPlace]:
    """Groups and a BPF file system of our own, which go at the end with all that was attached. Raises HostError.

    Only this thread, and what it starts, sees the file system; so it goes with this process even when that is killed.
    """
    from tpctl.bpf import bpffs

    with own_groups() as groups, own_mounts():
        pins = Path(tempfile.mkdtemp(prefix="tpctl-bpffs-"))
        try:
            bpffs.mount(pins)
            yield OwnPlace(groups, pins)
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(pins), _MNT_DETACH)
            pins.rmdir()


def _clear_abandoned(directory: Path) -> None:
    """Remove what a rehearsal left that was killed: groups of that name, of a process that is gone, without any other.

    The process may be alive in another namespace of processes: then there is somebody in it.
    """
    for home in directory.glob(f"{NAME}-*-*"):
        owner = home.name.split("-")[-2]
        if not Path("/proc", owner).exists() and not _populated(home):
            with contextlib.suppress(OSError):
                for group_directory in sorted((path for path in home.rglob("*") if path.is_dir()), reverse=True):
                    group_directory.rmdir()
                home.rmdir()


def _populated(directory: Path) -> bool:
    """Whether any process is in a group, or in one below it."""
    try:
        return "populated 1" in (directory / "cgroup.events").read_text(encoding="ascii")
    except OSError:
        return True


def remove(directory: Path) -> None:
    """Remove a group. Nobody is in it any more, but the kernel may still be putting away a process that has ended."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            directory.rmdir()
        except OSError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
        return
