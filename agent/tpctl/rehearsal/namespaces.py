"""Anonymous network namespaces, entered by one single-threaded process.

A socket belongs to the namespace it was created in, and netfilter's owner match reads the fsuid of its creator. So no
helper processes are needed: enter, become the user, create the socket, come back. Nothing is put in /run/netns; a
namespace lives as long as its file descriptor, and so disappears with this process even after SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tpctl.system.errors import HostError

CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
_MS_REC = 0x4000
_MS_SLAVE = 0x80000
_HERE = "/proc/thread-self/ns/net"
READY_AND_QUIET = {
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    # Addresses are usable at once, without a second of duplicate address detection.
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/default/router_solicitations": "0",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
}
"""Settings, for `write_sysctls`, of a namespace whose links take every packet at once, and send none by themselves."""


def _libc() -> ctypes.CDLL:
    """The C library; os.setns and os.unshare only come with Python 3.12."""
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise HostError(f"{call}: {os.strerror(number)} (root, or CAP_SYS_ADMIN, is needed for namespaces)")


def _enter(fd: int) -> None:
    _checked(_libc().setns(fd, CLONE_NEWNET), "setns")


class Namespace:
    """A network namespace held open by a file descriptor. Raises HostError when the kernel refuses."""

    def __init__(self) -> None:
        back = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc().unshare(CLONE_NEWNET), "unshare")
            try:
                self.fd = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
            finally:
                _enter(back)
        finally:
            os.close(back)

    @classmethod
    def current(cls) -> Self:
        """The one this process is in."""
        made = cls.__new__(cls)
        made.fd = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        return made

    @contextlib.contextmanager
    def inside(self, uid: int = 0) -> Iterator[None]:
        """Run the block inside the namespace, with `uid` as the effective user.

        Programs started in the block inherit the namespace. Only for a process with one thread: the user id is the
        whole process's.
        """
        back = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        before = os.geteuid()
        try:
            _enter(self.fd)
            try:
                if uid != before:
                    os.seteuid(uid)
                yield
            finally:
                if uid != before:
                    os.seteuid(before)
                _enter(back)
        finally:
            os.close(back)

    def close(self) -> None:
        """Let the kernel remove the namespace, with the links in it, once no socket of it is open."""
        os.close(self.fd)


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """Run the block where whatever this thread mounts is seen by it alone, and by what it starts. Raises HostError.

    Threads that are started in the block have to end in it: setns(2) takes none that shares its working directory.
    """
    with contextlib.ExitStack() as stack:
        handles = []
        for path in ("/proc/thread-self/ns/mnt", "/", "."):
            handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, handles[-1])
        back, root, working = handles
        _checked(_libc().unshare(CLONE_NEWNS), "unshare")
        try:
            _checked(_libc().mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "mount")
            yield
        finally:
            _checked(_libc().setns(back, CLONE_NEWNS), "setns")
            # It puts the thread into the root directory of the namespace, which need not be where it was.
            os.fchdir(root)
            os.chroot(".")
            os.fchdir(working)


def write_sysctls(values: dict[str, str]) -> None:
    """Set kernel settings of the current namespace, named as under /proc/sys/net; those this kernel lacks are skipped.

    /proc/sys/net shows the namespace of the task that opens it, so no mount is needed. Raises HostError.
    """
    for name, value in values.items():
        path = Path("/proc/sys/net", name)
        if not path.exists():
            continue
        try:
            path.write_text(value)
        except OSError as refused:
            raise HostError(f"{path}: {refused.strerror}") from refused


def has_ipv6() -> bool:
    """Whether this kernel speaks IPv6 at all."""
    return Path("/proc/sys/net/ipv6").exists()
