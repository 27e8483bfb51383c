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
from contextlib import suppress
from pathlib import Path

from agent.engines.ebpf import syscall
from agent.host.sockets import Listener, listeners
from agent.policy import Protocol

SLOTS = 32
"""For each family; IPv6 sockets, which may take IPv4 too, in the second half."""
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
"""The same on every architecture (Linux 5.3, 5.6)."""
_SO_COOKIE = 57


def register(map_fd: int, port: int) -> int:
    """Put every socket that listens on `port` of any address into the map; hands back how many there were."""
    wanted = {item.inode: item for item in listeners(Protocol.TCP) if item.port == port and item.address.is_unspecified}
    count = 0
    for item, descriptor in _descriptors(wanted):
        try:
            if _bound_to_device(descriptor):
                continue
            _register(map_fd, descriptor, SLOTS if item.address.version == 6 else 0)
            count += 1
        finally:
            os.close(descriptor)
    return count


def registered(map_fd: int) -> int:
    """How many sockets are in the map."""
    return len(list(_held(map_fd)))


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


def _bound_to_device(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).strip(b"\0"))


def _descriptors(wanted: dict[int, Listener]) -> Iterator[tuple[Listener, int]]:
    """A descriptor of our own for each of the sockets, by inode; stops when all were found."""
    left = {f"socket:[{inode}]": item for inode, item in wanted.items()}
    for directory in Path("/proc").glob("[0-9]*"):
        if not left:
            return
        for number, target in _open_files(directory):
            if target not in left:
                continue
            try:
                copy = _copied(int(directory.name), number)
            except OSError:
                continue  # it was closed meanwhile; another process may hold it too
            yield left.pop(target), copy


def _open_files(directory: Path) -> Iterator[tuple[int, str]]:
    """The descriptors of a process and what they stand for; those that are closed meanwhile are left out."""
    try:
        entries = list((directory / "fd").iterdir())
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):
            yield int(entry.name), str(entry.readlink())


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
