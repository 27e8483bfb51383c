"""Where on this host the programs are attached and kept: cgroups, the BPF file system, the network namespace."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tpctl.host import cgroups
from tpctl.host.mounts import mount_numbers, mounts, of_first
from tpctl.spec.policy import Cgroup
from tpctl.system import private_folder
from tpctl.system.errors import ApplyError, HostError

BPFFS = Path("/sys/fs/bpf")
_OURS = "tpctl"
_SO_NETNS_COOKIE = 71
_INSTEAD = "use --engine nftables or --engine iptables"


class Netns(NamedTuple):
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


class Place(NamedTuple):
    """The directories the engine works in."""

    top: Path
    """The cgroup that holds the data plane's processes and the applications': normally the root of the hierarchy."""
    bpffs: Path
    """Where links are pinned."""

    def applications(self, cgroup: Cgroup | None) -> Path:
        """The directory of the cgroup whose connections are redirected."""
        return cgroups.root() / cgroup.path if cgroup else self.top

    @property
    def home(self) -> Path:
        """The folder of all pins. It goes with the last of them; a tpctl that was killed may leave it empty."""
        return self.bpffs / _OURS

    @property
    def folder(self) -> Path:
        """The pins of this network namespace."""
        return self.home / netns().key

    def make_folder(self) -> Path:
        """Its folder, made if need be; only root may look into it. Raises ApplyError."""
        try:
            for directory in (self.home, self.folder):
                private_folder.prepare(directory, 0o700)
        except OSError as error:
            raise ApplyError(f"{self.folder} cannot be made: {error.strerror}. Nothing was changed") from error
        return self.folder

    def elsewhere(self) -> Iterator[Path]:
        """Pins of this network namespace in other BPF file systems: an earlier install was told to use another one."""
        key, own = netns().key, _device(self.bpffs)
        for mounted in mounts("thread-self", "bpf"):
            if (mounted / _OURS / key).is_dir() and _device(mounted) != own:
                yield mounted / _OURS / key

    def folders(self) -> Iterator[Path]:
        """The pins of every network namespace, dead ones too."""
        return iter(sorted(self.home.iterdir())) if self.home.is_dir() else iter(())


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None


def is_inside(cgroup: Path) -> bool:
    """Whether this process is in a cgroup, or in one below it."""
    own = cgroups.of_process("thread-self")
    return own is not None and (cgroups.root() / own).is_relative_to(cgroup)


def bpffs() -> Path:
    """The BPF file system of the whole host. Raises HostError when there is none, or it is out of reach.

    `ip netns exec` puts an empty /sys of its own in front of it, and whatever is pinned there ends with the command;
    the way around goes through the root directory of process 1.
    """
    if BPFFS in mounts("thread-self", "bpf"):
        return BPFFS
    try:
        if BPFFS in mounts("1", "bpf"):
            return of_first(BPFFS)
        private = not mount_numbers("thread-self") & mount_numbers("1")
    except HostError as error:
        raise HostError(f"the BPF file system {error}; {_INSTEAD}") from error
    except OSError:
        private = False  # process 1 is none of our business here: this is a container, with mounts of its own
    if private:
        raise HostError(
            f"no BPF file system is mounted at {BPFFS} of this host; mount it (mount -t bpf bpf {BPFFS}), or {_INSTEAD}"
        )
    return BPFFS


def find(top: Path | None = None, pins: Path | None = None) -> Place:
    """The place to work in: the whole host's unless told otherwise. Raises HostError."""
    try:
        chosen = top or cgroups.root()
    except HostError as error:
        raise HostError(f"the eBPF engine needs cgroup2: {error}; {_INSTEAD}") from error
    try:
        is_group = (chosen / "cgroup.procs").exists()
    except OSError as error:
        raise HostError(f"the control groups below {chosen} are out of reach: {error.strerror}; {_INSTEAD}") from error
    if not is_group:
        raise HostError(f"{chosen} is not a directory of control groups; {_INSTEAD}")
    return Place(chosen, pins or bpffs())
