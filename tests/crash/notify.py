"""Stops at chosen system calls of a process and of all that it starts, before they happen (seccomp_unotify(2)).

Unlike `strace -e inject`, which counts for each process alone, this has one order over all of them, sees the arguments,
and costs nothing for other calls.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SECCOMP = 317
_PIDFD_GETFD = 438
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_RECEIVE = 0xC0502100
_SEND = 0xC0182101
_CONTINUE = 1
_USER_NOTIF = 0x7FC00000
_ALLOW = 0x7FFF0000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARGUMENTS_AT = 0, 16
_NOTIFICATION = struct.Struct("=QII iI Q 6Q")
_ANSWER = struct.Struct("=Qqi I")


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to happen; its thread waits for `proceed` or `refuse`."""

    identity: int
    process: int
    number: int
    arguments: tuple[int, ...]

    def memory(self, address: int, size: int) -> bytes:
        """The caller's memory; empty where there is none."""
        try:
            descriptor = os.open(f"/proc/{self.process}/mem", os.O_RDONLY)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, size, address)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def text(self, address: int) -> str:
        """A string of the caller's; it may lie right before the end of a page."""
        size = min(4096, 4096 - address % 4096)
        found = self.memory(address, size)
        if b"\0" not in found:
            found += self.memory(address + size, 4096)
        return found.partition(b"\0")[0].decode(errors="replace")

    def opened(self, descriptor: int) -> str:
        """What a descriptor of the caller's is."""
        try:
            return str(Path(f"/proc/{self.process}/fd/{descriptor}").readlink())
        except OSError:
            return ""


def program(numbers: Sequence[int], masks: Mapping[int, tuple[int, int]]) -> bytes:
    """A BPF program that reports the calls of these numbers.

    A number in `masks` is reported only when the argument of that index has any of these bits.
    """
    code = [(_LOAD, 0, 0, _NUMBER_AT)]
    for number in numbers:
        if number in masks:
            index, bits = masks[number]
            code += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index),
                (_ANY_BIT, 0, 1, bits),
                (_RETURN, 0, 0, _USER_NOTIF),
                (_RETURN, 0, 0, _ALLOW),
            ]
        else:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _USER_NOTIF)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *one) for one in code)


def watch(code: bytes) -> int:
    """From now on calls of this thread, and of all it starts, wait for a listener; hands back its descriptor.

    The filter has to let through what the caller uses to hand that on.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions)))
    found = ctypes.CDLL(None, use_errno=True).syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, header)
    if found < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(found)


def fetch(process: int, descriptor: int) -> int:
    """A copy of another process's descriptor."""
    handle = os.pidfd_open(process)
    try:
        found = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, handle, descriptor, 0)
        if found < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(found)
    finally:
        os.close(handle)


def receive(listener: int) -> Call | None:
    """The next call; None when its caller was killed meanwhile."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    identity, process, _, number, _, _, *arguments = _NOTIFICATION.unpack(bytes(buffer))
    return Call(identity, process, number, tuple(arguments))


def proceed(listener: int, call: Call) -> None:
    """Let a call happen."""
    _answer(listener, _ANSWER.pack(call.identity, 0, 0, _CONTINUE))


def refuse(listener: int, call: Call, number: int) -> None:
    """Let a call fail with an errno; it does not happen."""
    _answer(listener, _ANSWER.pack(call.identity, 0, -number, 0))


def _answer(listener: int, answer: bytes) -> None:
    try:
        fcntl.ioctl(listener, _SEND, bytearray(answer))
    except OSError as error:
        if error.errno != errno.ENOENT:  # it was killed
            raise
