"""Becoming the user the relay runs as, and keeping no more rights than its listeners need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import resource
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from tpctl.host.users import uid_of
from tpctl.relay.process import foresight
from tpctl.relay.settings.model import Role, Settings, Source
from tpctl.system.errors import HostError, InputError

CAP_NET_BIND_SERVICE = 10
CAP_NET_RAW = 13
"""linux/capability.h."""
_NAMES = {CAP_NET_BIND_SERVICE: "CAP_NET_BIND_SERVICE", CAP_NET_RAW: "CAP_NET_RAW"}
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
"""linux/prctl.h."""
_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_HEADER = struct.Struct("=Ii")
_CAPABILITY_DATA = struct.Struct("=6I")
_PRIVILEGED_PORTS = range(1, 1024)
_RESERVED = 32
_OTHERS = 0o007
"""The rights of those who are neither the user nor in the group."""


def needed_capabilities(settings: Settings) -> frozenset[int]:
    """What the listeners need beyond an ordinary user's rights.

    Either of CAP_NET_RAW and CAP_NET_ADMIN allows IP_TRANSPARENT (net/ipv4/ip_sockglue.c). The former is the smaller
    one: with the latter, whoever takes the relay over could change every rule, route and address of the host.
    """
    listens = [listener.listen for listener in settings.listeners]
    needed = set()
    if any(listen.port in _PRIVILEGED_PORTS for listen in listens):
        needed.add(CAP_NET_BIND_SERVICE)
    if any(listener.listen.transparent or listener.source is Source.CLIENT for listener in settings.listeners):
        needed.add(CAP_NET_RAW)
    return frozenset(needed)


def useful_capabilities(settings: Settings) -> frozenset[int]:
    """What the listeners use if this process may.

    Outbound ones dial from a port below 1024 for clients of this host that have one (NFS, rsh).
    """
    outbound = any(listener.role is Role.OUTBOUND for listener in settings.listeners)
    useful = {CAP_NET_BIND_SERVICE} if outbound else set()
    return frozenset(number for number in useful if _permitted() & 1 << number)


def require(capabilities: Collection[int], why: str) -> None:
    """Raise HostError unless this process has these capabilities; `why` names what needs them."""
    lacking = [_NAMES[number] for number in sorted(capabilities) if not _permitted() & 1 << number]
    if lacking:
        raise HostError(
            f"{why} needs {' and '.join(lacking)}: start as root with --user, or let the unit keep that "
            "(AmbientCapabilities=)"
        )


def _permitted() -> int:
    """The capabilities of this process, as a mask (proc_pid_status(5))."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("CapPrm:")[2].split()[0], 16)


def become(user: str, capabilities: Collection[int] = ()) -> None:
    """Run as another user (a name or a uid) from now on, with these capabilities alone, and never regain others.

    Must come before any socket is opened: rules match the user who created a socket, not the one who uses it.
    Raises InputError when there is no such user, HostError when this process may not become that user.
    """
    uid = uid_of(user)
    if uid is None:
        raise InputError(f"--user: there is no user {user!r} on this host")
    if uid == os.geteuid():
        return
    entry = pwd.getpwuid(uid)
    libc = ctypes.CDLL(None, use_errno=True)
    if capabilities:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    _bound(libc, capabilities)
    try:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        _import_what_will_be_hidden(uid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except PermissionError:
        raise HostError(f"--user {user}: only root may become another user") from None
    _keep(libc, capabilities)


def _import_what_will_be_hidden(uid: int) -> None:
    before = os.geteuid()
    os.seteuid(uid)
    try:
        is_readable = foresight.is_readable()
    finally:
        os.seteuid(before)
    if not is_readable:
        foresight.load_all()


def confine() -> None:
    """Close the ways in which the process could gain rights, or give what it knows away.

    It gains nothing by executing a program (no_new_privs). Other processes of the same user, which by mistake may be
    an application's, cannot attach to it or read its memory, in which there are private keys; nor is there a core
    dump. Sockets in the file system are never for everybody, whatever the umask was. A program that is executed
    begins without the second of these, so a successor calls this too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.umask(os.umask(_OTHERS) | _OTHERS)


def _bound(libc: ctypes.CDLL, capabilities: Collection[int]) -> None:
    """Let no program that is executed ever have other capabilities. Who may not say that has no such rights to lose."""
    number = 0
    while libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in capabilities:
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1


def _keep(libc: ctypes.CDLL, capabilities: Collection[int]) -> None:
    """Have these capabilities alone, also in the programs this one executes: a restart is one."""
    mask = sum(1 << number for number in capabilities)
    header = _CAPABILITY_HEADER.pack(_CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, the lower half of the 64 bits first.
    if libc.capset(header, _CAPABILITY_DATA.pack(mask, mask, mask, 0, 0, 0)):
        raise HostError(f"the capabilities a listener needs cannot be kept: {os.strerror(ctypes.get_errno())}")
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in capabilities:
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the administrator does: a relayed connection needs two, and bulk ones more.

    All but a few, which are for `reserved_descriptors`.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept_back = 0 if hard == resource.RLIM_INFINITY else min(_RESERVED, hard // 8)
    _limit_descriptors(hard - kept_back, hard)


@contextlib.contextmanager
def reserved_descriptors() -> Iterator[None]:
    """Have a few more for a moment: what the administrator asks for must not fail because clients have taken all.

    Only for the thread that accepts clients: they would be given to them. What is opened stays open.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit_descriptors(hard, hard)
    try:
        yield
    finally:
        raise_descriptor_limit()


def _limit_descriptors(soft: int, hard: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
