"""Where on this host the programs are attached and kept: cgroups, the BPF file system, the network namespace."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ApplyError, HostError

BPFFS = Path("/sys/fs/bpf")
_INIT = Path("/proc/1")
_OURS = "tpctl"
_SO_NETNS_COOKIE = 71
_INSTEAD = "use --engine nftables or --engine iptables"


@dataclass(frozen=True, slots=True)
class Netns:
    """What the kernel knows this network namespace by."""

    number: int
    is_cookie: bool
    """Whether it is a cookie (Linux 5.14 and later), which is never given twice; else an inode number."""
    inode: int

    @property
    def key(self) -> str:
        """The name of the folder of its pins."""
        return f"netns-{self.number}" if self.is_cookie else f"netns-inode-{self.number}"


def netns() -> Netns:
    """This thread's network namespace."""
    inode = Path("/proc/thread-self/ns/net").stat().st_ino
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            (cookie,) = struct.unpack("Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
            return Netns(cookie, True, inode)
    except OSError:
        return Netns(inode, False, inode)


@dataclass(frozen=True, slots=True)
class Place:
    """The directories the engine works in."""

    applications: Path
    """Connections of the processes in this cgroup are redirected."""
    data_plane: Path
    """A cgroup that holds the data plane's processes and the applications'."""
    bpffs: Path
    """Where links are pinned."""

    @property
    def folder(self) -> Path:
        """The pins of this network namespace."""
        return self.bpffs / _OURS / netns().key

    def make_folder(self) -> Path:
        """Its folder, made if need be; only root may look into it. Raises ApplyError."""
        try:
            for directory in (self.bpffs / _OURS, self.folder):
                directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ApplyError(f"{self.folder} cannot be made: {error.strerror}. Nothing was changed") from error
        return self.folder

    def folders(self) -> Iterator[Path]:
        """The pins of every network namespace, dead ones too."""
        ours = self.bpffs / _OURS
        return iter(sorted(ours.iterdir())) if ours.is_dir() else iter(())


def _mounts(process: str, kind: str) -> list[Path]:
    """Where a file system of a kind is mounted, in a process's view (proc_pid_mountinfo(5))."""
    found = []
    for line in Path("/proc", process, "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == kind:
            found.append(Path(before.split(" ")[4]))
    return found


def cgroup2() -> Path:
    """The root of the unified hierarchy. Raises HostError when it is not mounted."""
    found = _mounts("thread-self", "cgroup2")
    if not found:
        raise HostError(f"the eBPF engine needs cgroup2, and it is not mounted on this host; {_INSTEAD}")
    return found[0]


def is_inside(cgroup: Path) -> bool:
    """Whether this process is in a cgroup, or in one below it."""
    try:
        lines = Path("/proc/thread-self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        return (cgroup2() / own.lstrip("/")).is_relative_to(cgroup)
    except (OSError, StopIteration):
        return False


def bpffs() -> Path:
    """The BPF file system of the whole host. Raises HostError when there is none.

    `ip netns exec` puts an empty /sys of its own in front of it, and whatever is pinned there ends with the command;
    the way around goes through the root directory of process 1.
    """
    if BPFFS in _mounts("thread-self", "bpf"):
        return BPFFS
    try:
        if BPFFS in _mounts("1", "bpf"):
            return _INIT / "root" / BPFFS.relative_to("/")
        private = not _mount_numbers("thread-self") & _mount_numbers("1")
    except OSError:
        private = False  # process 1 is none of our business here: this is a container, with mounts of its own
    if private:
        raise HostError(
            f"no BPF file system is mounted at {BPFFS} of this host; mount it (mount -t bpf bpf {BPFFS}), or {_INSTEAD}"
        )
    return BPFFS


def _mount_numbers(process: str) -> set[str]:
    """The ids of what a process sees mounted. No two mount namespaces have one in common."""
    lines = Path("/proc", process, "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.split(" ", 1)[0] for line in lines}


def mount_bpffs(place: Path) -> None:
    """Mount the BPF file system unless it is there already. Raises HostError."""
    mounted = _mounts("thread-self", "bpf")
    if place in mounted or str(place).startswith(str(_INIT)):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(place), b"bpf", 0, b"mode=0700") != 0:
        reason = os.strerror(ctypes.get_errno())
        raise HostError(f"the BPF file system cannot be mounted at {place}: {reason}; {_INSTEAD}")


def find(cgroup: Path | None = None, root: Path | None = None, pins: Path | None = None) -> Place:
    """The place to work in: the whole host unless told otherwise. Raises HostError."""
    top = root or cgroup2()
    applications = cgroup or top
    for directory in (top, applications):
        if not directory.is_dir():
            raise HostError(f"there is no cgroup {directory}")
    return Place(applications, top, pins or bpffs())
