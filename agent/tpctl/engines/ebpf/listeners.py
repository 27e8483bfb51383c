"""Hands the data plane's listening sockets that were there first to the kernel's map of them.

Later ones register themselves (bpf/data_plane.c).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator

from tpctl.bpf import syscall
from tpctl.host.holders import holders
from tpctl.host.sockets import Listener, listeners
from tpctl.spec.policy import Protocol

SLOTS = 32
"""For each family; IPv6 sockets, which may take IPv4 too, in the second half."""
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
"""The same on every architecture (Linux 5.3, 5.6)."""
_SO_COOKIE = 57


def register(map_fd: int, port: int) -> int:
    """Put every socket that listens on `port` of any address into the map; hands back how many there were."""
    wanted = {
        item.inode: item
        for item in listeners(Protocol.TCP)
        if item.port == port and item.address.is_unspecified and not item.device
    }
    count = 0
    for item, descriptor in _descriptors(wanted):
        try:
            _register(map_fd, descriptor, SLOTS if item.address.version == 6 else 0)
            count += 1
        finally:
            os.close(descriptor)
    return count


def registered(map_fd: int) -> frozenset[int]:
    """The sockets in the map, by cookie."""
    return frozenset(_held(map_fd))


def _held(map_fd: int) -> Iterator[int]:
    for slot in range(2 * SLOTS):
        raw = syscall.lookup(map_fd, struct.pack("=I", slot), 8)
        if raw is not None:
            yield int.from_bytes(raw, "little")


def _register(map_fd: int, descriptor: int, base: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        cookie = int.from_bytes(listener.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")
    if cookie in _held(map_fd):
        return
    for slot in range(base, base + SLOTS):
        try:
            syscall.update(map_fd, struct.pack("=I", slot), struct.pack("=Q", descriptor), syscall.NO_EXIST)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            return


def _descriptors(wanted: dict[int, Listener]) -> Iterator[tuple[Listener, int]]:
    """A descriptor of our own for each of the sockets, by inode."""
    left = dict(wanted)
    for held in holders(wanted):
        if held.inode not in left:
            continue
        try:
            copy = _copied(held.process, held.descriptor)
        except OSError:
            continue  # it was closed meanwhile; another process may hold it too
        yield left.pop(held.inode), copy


def _copied(process: int, descriptor: int) -> int:
    """A copy of another process's descriptor. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = _called(libc, _PIDFD_OPEN, process, 0)
    try:
        return _called(libc, _PIDFD_GETFD, pidfd, descriptor, 0)
    finally:
        os.close(pidfd)


def _called(libc: ctypes.CDLL, *arguments: int) -> int:
    result = int(libc.syscall(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
