"""A cgroup and a BPF file system for one test: nothing outside them is ever attached to."""

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

from agent.engines.ebpf.engine import EbpfEngine, load
from agent.engines.ebpf.place import mount_bpffs
from agent.host import cgroups
from agent.policy import Cgroup

_numbers = itertools.count()
_MNT_DETACH = 2


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """Where a test's programs live."""

    cgroup: Path
    pins: Path

    def engine(self, *, chooses_sockets: bool | None = None) -> EbpfEngine:
        """The engine for the current namespace, kept to this test's cgroup."""
        return load(top=self.cgroup, pins=self.pins, chooses_sockets=chooses_sockets)


def enter(cgroup: Path) -> None:
    """Move this process into a cgroup; the sockets it makes from now on belong there."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def group(directory: Path) -> Cgroup:
    """The control group of a directory."""
    return cgroups.find(str(directory.relative_to(cgroups.root())))


@contextlib.contextmanager
def own_place() -> Iterator[OwnPlace]:
    """A cgroup with this process in it, and a BPF file system; both are gone at the end, with all that was attached."""
    top = cgroups.root()
    before = top / (cgroups.of_process("self") or "")
    cgroup = top / f"tpctl-test-{os.getpid()}-{next(_numbers)}"
    pins = Path(tempfile.mkdtemp(prefix="tpctl-bpffs-"))
    cgroup.mkdir()
    try:
        mount_bpffs(pins)
        enter(cgroup)
        yield OwnPlace(cgroup, pins)
    finally:
        enter(before)
        ctypes.CDLL(None).umount2(os.fsencode(pins), _MNT_DETACH)
        pins.rmdir()
        _remove(cgroup)


def _remove(cgroup: Path) -> None:
    """Its processes have ended, but the kernel may still be putting one away."""
    for _ in range(50):
        try:
            cgroup.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return
