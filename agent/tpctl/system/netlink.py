"""Netlink by hand (netlink(7), RFC 3549): one request, its answer, and a time limit.

A library would bring an event loop with threads of its own, which waits for ever when one of them runs out of memory;
take 140 ms to import; and 20 MB.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

ROUTE, NETFILTER = 0, 12
"""NETLINK_ROUTE and NETLINK_NETFILTER (linux/netlink.h)."""
ACK, DUMP, EXCLUSIVE, CREATE = 0x4, 0x300, 0x200, 0x400
"""NLM_F_ACK and so on; to dump is NLM_F_ROOT and NLM_F_MATCH."""
_INTERRUPTED = 0x10
"""NLM_F_DUMP_INTR."""
ERROR = 2
"""NLMSG_ERROR: also the answer that a request was carried out."""
WAIT_SECONDS = 15.0
"""For each message of the kernel, which answers in microseconds, unless others hold what it needs."""

_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_REQUEST = 1
_DONE = 3
_NESTED = 0x8000
_TYPE = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_NUMBER = struct.Struct("=i")
_RECEIVE_BYTES = 1 << 16
"""The kernel puts at most 32 kB of a dump into one answer (netlink_recvmsg() in net/netlink/af_netlink.c)."""

Attributes = dict[int, bytes]
Value = bytes | int | Mapping[int, Any]


def attributes(values: Mapping[int, Value]) -> bytes:
    """Attributes as the kernel reads them: a number has 32 bits of this machine's order, a mapping is nested."""
    packed = b""
    for kind, value in values.items():
        if isinstance(value, Mapping):
            kind, content = kind | _NESTED, attributes(value)
        else:
            content = struct.pack("=I", value) if isinstance(value, int) else value
        packed += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)
    return packed


def parse(packed: bytes) -> Attributes:
    """The attributes of a message, or of one that holds others; what is cut short is left out."""
    found: Attributes = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(packed):
        size, kind = _ATTRIBUTE.unpack_from(packed, at)
        if size < _ATTRIBUTE.size or at + size > len(packed):
            break
        found[kind & _TYPE] = packed[at + _ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3
    return found


class Netlink:
    """A socket in the network namespace it was made in. A context manager."""

    def __init__(self, protocol: int) -> None:
        """Raises OSError where the kernel does without that protocol."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(WAIT_SECONDS)
        self._number = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def be_strict(self) -> None:
        """Let the kernel leave out of a dump what was not asked for (NETLINK_GET_STRICT_CHK, Linux 4.20).

        Raises OSError where it cannot.
        """
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)

    def ask(self, kind: int, body: bytes, flags: int = 0, *, whole: bool = False) -> Iterator[bytes]:
        """The bodies of the messages that answer a request; it is sent when the first is asked for.

        Raises OSError with the kernel's errno when it refuses, with ETIMEDOUT when it does not answer; and with EAGAIN
        when a dump has to be `whole`, and somebody has changed what is dumped meanwhile.
        """
        self._number += 1
        wanted = flags if flags & DUMP == DUMP else flags | ACK
        try:
            self._socket.send(message(kind, body, wanted, self._number))
            while True:
                for number, answered, content, told in _flagged(self._socket.recv(_RECEIVE_BYTES)):
                    if number != self._number:
                        continue
                    if whole and told & _INTERRUPTED:
                        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                    if answered in (ERROR, _DONE):
                        raise_if_refused(content)
                        return
                    yield content
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"the kernel has not answered within {WAIT_SECONDS:g} s") from None

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Send a request that has no answer but that it was carried out. Raises as `ask` does."""
        for _ in self.ask(kind, body, flags):
            pass


def message(kind: int, body: bytes, flags: int, number: int) -> bytes:
    """A request; the answers to it have its number."""
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, number, 0) + body


def messages(received: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, type and content of each message that came at once."""
    return ((number, kind, content) for number, kind, content, _ in _flagged(received))


def _flagged(received: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """The same, and the flags of each."""
    at = 0
    while at + _HEADER.size <= len(received):
        size, kind, flags, number, _ = _HEADER.unpack_from(received, at)
        if size < _HEADER.size:
            return
        yield number, kind, received[at + _HEADER.size : at + size], flags
        at += (size + 3) & ~3


def raise_if_refused(content: bytes) -> None:
    """Raise OSError when an answer, of type ERROR, does not say that the request was carried out."""
    code = -_NUMBER.unpack_from(content)[0] if len(content) >= _NUMBER.size else 0
    if code > 0:
        raise OSError(code, os.strerror(code))
