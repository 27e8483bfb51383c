"""Which network namespace a record belongs to, and whether that one still lives.

Linux names a namespace by a cookie that it never gives twice until the next boot (SO_NETNS_COOKIE, 5.14); before, by an
inode number that the next namespace may get. Neither tells whether a namespace is gone: one may be held by a process, a
mount, a descriptor somewhere, or by nothing but a socket. The ids that namespaces have in one another (RTM_NEWNSID,
rtnetlink(7)) tell both, because they go with the namespace, and with nothing else (unhash_nsid() in
net/core/net_namespace.c):

- where there is no cookie, a namespace gets an id of its own in itself. A record bears it; the next namespace of the
  same inode number has another one, or none.
- a namespace gets an id in the one that the outermost process in sight is in, normally that of process 1. Once that
  id is unknown there, the namespace has gone. Whoever cannot ask there takes it for alive.

Records also bear the boot they are of: /run of a container may outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tpctl.host import ssh
from tpctl.system.threads import in_thread

SO_NETNS_COOKIE = 71
"""include/uapi/asm-generic/socket.h, since Linux 5.14."""
_CLONE_NEWNET = 0x40000000
_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_NETNSA_NSID, _NETNSA_FD = 1, 3
"""linux/net_namespace.h. Asking by NETNSA_NSID takes Linux 5.0; before, everything is taken for alive."""
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_HEADER = struct.Struct("=IHHII")
_GENERAL = struct.Struct("=Bxxx")
_ATTRIBUTE = struct.Struct("=HHi")
_ERROR = struct.Struct("=i")
_FIRST_ID, _LAST_ID = 1 << 16, (1 << 31) - 1
"""Low ones are the kernel's to give: it takes the first that is free."""
_REPLY_LIMIT = 8192
_UNKNOWN = -1
_OWN = "/proc/thread-self/ns/net"
_BOOT = Path("/proc/sys/kernel/random/boot_id")

T = TypeVar("T")


def key() -> str:
    """What tells this network namespace from every other one that lives."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            (cookie,) = struct.unpack("Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))
            return f"netns-{cookie}"
    except OSError:
        return f"netns-inode-{Path(_OWN).stat().st_ino}"


def mark() -> dict[str, Any]:
    """What a record bears of this namespace; JSON types. Gives the namespace the ids that it takes."""
    made: dict[str, Any] = {"boot": _boot()}
    if _is_inode(key()):
        with contextlib.suppress(OSError), _open(_OWN) as own:
            made["self"] = _given_id(own)
    with contextlib.suppress(OSError):
        made["home"], made["id"] = _in_home(_registered)
    return made


def belongs(marked: object) -> bool:
    """Whether a record that bears this is of this namespace; one of an older version bears nothing, and is."""
    if not isinstance(marked, Mapping):
        return marked is None
    if marked.get("boot") != _boot():
        return False
    number = marked.get("self")
    if number is None or not _is_inode(key()):
        return True
    with contextlib.suppress(OSError), _open(_OWN) as own:
        return bool(number == _id_of(own))
    return True


def is_dead(marked: object) -> bool:
    """Whether the namespace of a record that bears this has gone for certain."""
    if not isinstance(marked, Mapping):
        return False
    if marked.get("boot") != _boot():
        return True
    home, number = marked.get("home"), marked.get("id")
    if not isinstance(number, int) or not 0 <= number <= _LAST_ID:
        return False
    with contextlib.suppress(OSError):
        return _in_home(lambda _: key() == home and not _is_known(number))
    return False


def _boot() -> str:
    return _BOOT.read_text().strip()


def _is_inode(name: str) -> bool:
    return name.startswith("netns-inode-")


def _registered(own: int) -> tuple[str, int | None]:
    """In the home namespace: its key, and the id of a namespace there; none of its own, for that is home."""
    with _open(_OWN) as home:
        return key(), None if os.path.sameopenfile(own, home) else _given_id(own)


def _in_home(ask: Callable[[int], T]) -> T:
    """Call `ask` with a descriptor of this namespace, in a thread of the home namespace. Raises OSError.

    A thread of its own, because nothing must keep this one from coming back.
    """

    def enter(own: int, home: int) -> T:
        if ctypes.CDLL(None, use_errno=True).setns(home, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        return ask(own)

    with _open(_OWN) as own, _home() as home:
        if os.path.sameopenfile(own, home):
            return ask(own)
        return in_thread(lambda: enter(own, home))


@contextlib.contextmanager
def _home() -> Iterator[int]:
    """A descriptor of the namespace of the outermost process above this one that can be looked at."""
    above = [*ssh.ancestors(os.getpid()), Path("/proc/1")]
    for process in reversed(above):
        try:
            descriptor = os.open(process / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        return
    raise OSError(errno.ESRCH, "no process in sight")


@contextlib.contextmanager
def _open(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _given_id(of: int) -> int:
    """The id that a namespace has in this one; it gets one if it has none. Raises OSError."""
    while (held := _id_of(of)) == _UNKNOWN:
        wanted = int.from_bytes(os.urandom(4), "big") % (_LAST_ID - _FIRST_ID) + _FIRST_ID
        try:
            _asked(_RTM_NEWNSID, (_NETNSA_NSID, wanted), (_NETNSA_FD, of))
        except FileExistsError:  # the id is another's, or somebody has just given one
            continue
    return held


def _id_of(of: int) -> int:
    return _asked(_RTM_GETNSID, (_NETNSA_FD, of))


def _is_known(number: int) -> bool:
    """Whether an id is a namespace's here. Raises OSError when that cannot be told."""
    try:
        return _asked(_RTM_GETNSID, (_NETNSA_NSID, number)) == number
    except FileNotFoundError:
        return False


def _asked(kind: int, *attributes: tuple[int, int]) -> int:
    """The id of the kernel's answer, or -1. Raises OSError as the kernel refuses."""
    body = _GENERAL.pack(socket.AF_UNSPEC)
    body += b"".join(_ATTRIBUTE.pack(_ATTRIBUTE.size, name, value) for name, value in attributes)
    flags = _NLM_F_REQUEST | (_NLM_F_ACK if kind == _RTM_NEWNSID else 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)
        reply = netlink.recv(_REPLY_LIMIT)
    if _HEADER.unpack_from(reply)[1] == _NLMSG_ERROR:
        number = -_ERROR.unpack_from(reply, _HEADER.size)[0]
        if number:
            raise OSError(number, os.strerror(number))
        return _UNKNOWN
    at = _HEADER.size + _GENERAL.size
    while at + _ATTRIBUTE.size <= len(reply):
        size, name, value = _ATTRIBUTE.unpack_from(reply, at)
        if name == _NETNSA_NSID:
            return int(value)
        at += max((size + 3) & ~3, 4)
    return _UNKNOWN
