"""Which socket of this host a connection has or would reach, asked of the kernel: a netlink message of sock_diag(7).

By hand for the reason that stands in `agent.relay.routes`.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from agent.relay.original_destination import Destination

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ANY_STATE = 0xFFFFFFFF
_TCP_TIME_WAIT, _TCP_LISTEN = 6, 10
"""include/net/tcp_states.h"""
_NO_COOKIE = b"\xff" * 8
_REPLY_LIMIT = 8192

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_ID = struct.Struct("!HH16s16s")
_REPLY = struct.Struct("=BBBB")
_REST = struct.Struct("=24xI4x")
"""linux/inet_diag.h, struct inet_diag_msg behind both ends: idiag_uid. Attributes follow it."""
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO = 2


class Found(NamedTuple):
    """The socket of a connection."""

    uid: int
    """Who made it."""
    tcp_info: bytes
    """linux/tcp.h, struct tcp_info."""


def build_request(destination: Destination, client: tuple[str, int] | None = None, attributes: int = 0) -> bytes:
    """Ask for the socket that a segment of `client`, or of nobody in particular, to `destination` would reach.

    `attributes` are what is to come with it, a bit for each.
    """
    local = socket.inet_pton(destination.family, destination.host)
    remote, port = (socket.inet_pton(destination.family, client[0]), client[1]) if client else (bytes(16), 0)
    # The kernel calls our side the source: `idiag_src` is where the connection arrives (net/ipv4/inet_diag.c).
    identity = _ID.pack(destination.port, port, local, remote) + struct.pack("=I", destination.scope) + _NO_COOKIE
    body = _REQUEST.pack(destination.family, socket.IPPROTO_TCP, attributes, 0, _ANY_STATE) + identity
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body


def is_wildcard_listener(reply: bytes) -> bool:
    """Whether the kernel's answer is a listening socket that is bound to every address."""
    if len(reply) < _HEADER.size + _REPLY.size + _ID.size or _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:
        return False
    state = _REPLY.unpack_from(reply, _HEADER.size)[1]
    bound = _ID.unpack_from(reply, _HEADER.size + _REPLY.size)[2]
    return bool(state == _TCP_LISTEN and not any(bound))


def is_connection(reply: bytes) -> bool:
    """Whether the kernel's answer is the socket of a connection that has not ended: a SYN opens one anew that has."""
    if len(reply) < _HEADER.size + _REPLY.size or _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:
        return False
    return _REPLY.unpack_from(reply, _HEADER.size)[1] not in (_TCP_LISTEN, _TCP_TIME_WAIT)


def is_connected(destination: Destination, client: tuple[str, int]) -> bool:
    """Whether this host has a connection of that very client to a destination. False if the kernel cannot be asked."""
    return is_connection(_asked(build_request(destination, client)))


def connection(destination: Destination, client: tuple[str, int]) -> Found | None:
    """The socket of this host that has a connection of that very client; None without one, or if none can be asked for.

    Raises OSError for what is no address.
    """
    return parse_connection(_asked(build_request(destination, client, 1 << (_INET_DIAG_INFO - 1))))


def parse_connection(reply: bytes) -> Found | None:
    """The socket that the kernel's answer is about; None if it has no tcp_info, as one that has ended.

    >>> parse_connection(b"")
    """
    at = _HEADER.size + _REPLY.size + _ID.size
    if not is_connection(reply) or len(reply) < at + _REST.size:
        return None
    (uid,) = _REST.unpack_from(reply, at)
    at += _REST.size
    while at + _ATTRIBUTE.size <= len(reply):
        length, kind = _ATTRIBUTE.unpack_from(reply, at)
        if kind == _INET_DIAG_INFO:
            return Found(uid, reply[at + _ATTRIBUTE.size : at + length])
        at += max(_ATTRIBUTE.size, length + 3 & ~3)
    return None


def serves_every_address(destination: Destination) -> bool:
    """Whether what listens at a destination of this host listens at all of its addresses.

    False when nothing listens there, and when the kernel cannot be asked: not dialling is safe.
    """
    return is_wildcard_listener(_asked(build_request(destination)))


def _asked(request: bytes) -> bytes:
    """The kernel's answer; empty when there is none."""
    try:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as netlink:
            netlink.send(request)
            return netlink.recv(_REPLY_LIMIT)
    except OSError:
        return b""
