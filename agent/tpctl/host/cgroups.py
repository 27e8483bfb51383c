"""Control groups of the unified hierarchy (cgroups(7)): where they are mounted, and which one a process is in."""

from __future__ import annotations

from pathlib import Path

from tpctl.host.mounts import mounts, of_first
from tpctl.spec.policy import Cgroup
from tpctl.system import text
from tpctl.system.errors import HostError


def root() -> Path:
    """The directory of the hierarchy's root. Raises HostError when it is not mounted, or out of reach.

    `ip netns exec` mounts a /sys of its own without it; the way around goes through the root directory of process 1.
    """
    found = mounts("thread-self", "cgroup2")
    if found:
        return found[0]
    try:
        found = mounts("1", "cgroup2")
    except OSError:
        found = []
    if found:
        return of_first(found[0])
    raise HostError("cgroup2, the unified hierarchy of control groups, is not mounted on this host")


def find(path: str) -> Cgroup:
    """The control group of a path. Raises HostError when there is none."""
    directory = root() / path
    try:
        if (directory / "cgroup.procs").exists():
            return Cgroup(path, directory.stat().st_ino)
    except OSError as error:
        raise HostError(f"the control group {path} cannot be read: {error.strerror}") from error
    raise HostError(f"there is no control group {path} ({directory}); a service's exists only while it runs")


def is_current(cgroup: Cgroup) -> bool:
    """Whether the group of that path is still the one that was meant."""
    try:
        return find(cgroup.path) == cgroup
    except HostError:
        return False


def outdated(cgroup: Cgroup) -> str:
    """What a comparison with the kernel says of a group that `is_current` is false for: the rules name a dead one."""
    return f"-the cgroup {cgroup}: the rules refer to a group that is gone; `tpctl apply` binds them to its successor"


def of_process(process: int | str) -> str | None:
    """The path of the group a process is in (by pid, or "thread-self"), from the root; None when it cannot be told."""
    try:
        lines = text.lines(text.read(Path("/proc", str(process), "cgroup")))
    except OSError:
        return None
    return next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
