"""Answering a datagram from the address it was sent to, on a socket bound to the wildcard address.

Without this the kernel picks a source address by routing, and an application whose query was redirected waits for
ever: conntrack only translates answers that come from the address the query was translated to.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from functools import lru_cache

IP_PKTINFO = 8
"""linux/in.h; the socket module of Python 3.11 does not have it."""

LOOPBACK_INDEX = 1
"""Of lo, in every network namespace (LOOPBACK_IFINDEX, include/net/flow.h)."""

_INFO4 = struct.Struct("=i4s4s")
_INFO6 = struct.Struct("=16si")
ANCILLARY_SIZE = socket.CMSG_SPACE(_INFO6.size) + socket.CMSG_SPACE(_INFO4.size)

Ancillary = tuple[int, int, bytes]
_REMEMBERED = 1024


def enable(listener: socket.socket) -> None:
    """Make recvmsg() tell the address each datagram was sent to."""
    if listener.family == socket.AF_INET6:
        # IPv4 datagrams on a dual-stack socket come with the same control message, the address mapped.
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        listener.setsockopt(socket.SOL_IP, IP_PKTINFO, 1)


def came_over_loopback(received: Iterable[Ancillary]) -> bool:
    """Whether a datagram is from this host, as what is redirected to a loopback address always is.

    Unlike a source address, that cannot be forged: nothing arrives on lo from elsewhere. False for a datagram to
    another address of this host, for which the kernel names that one's interface, and when it says nothing.
    """
    for level, kind, data in received:
        if level == socket.SOL_IP and kind == IP_PKTINFO and len(data) >= _INFO4.size:
            return bool(_INFO4.unpack_from(data)[0] == LOOPBACK_INDEX)
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= _INFO6.size:
            return bool(_INFO6.unpack_from(data)[1] == LOOPBACK_INDEX)
    return False


@lru_cache(maxsize=_REMEMBERED)
def origin(received: tuple[Ancillary, ...]) -> tuple[tuple[Ancillary, ...], bool]:
    """`answer_from` and `came_over_loopback`: of most datagrams, the kernel says what it has said of others."""
    return tuple(answer_from(received)), came_over_loopback(received)


def answer_from(received: Iterable[Ancillary]) -> list[Ancillary]:
    """The control messages for sendmsg() that make an answer leave from the address that was asked.

    The interface is left to routing, except for link-local addresses, which mean nothing without one. Empty when the
    kernel did not say what was asked.
    """
    for level, kind, data in received:
        if level == socket.SOL_IP and kind == IP_PKTINFO and len(data) >= _INFO4.size:
            _interface, local, _asked = _INFO4.unpack_from(data)
            return [(level, kind, _INFO4.pack(0, local, bytes(4)))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= _INFO6.size:
            asked, interface = _INFO6.unpack_from(data)
            link_local = asked[0] == 0xFE and asked[1] & 0xC0 == 0x80
            return [(level, kind, _INFO6.pack(asked, interface if link_local else 0))]
    return []
