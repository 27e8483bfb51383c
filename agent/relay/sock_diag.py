"""Which listening socket a connection would reach, asked of the kernel: one netlink message of sock_diag(7).

By hand for the reason that stands in `agent.relay.routes`.
"""

from __future__ import annotations

import socket
import struct

from agent.relay.original_destination import Destination

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ANY_STATE = 0xFFFFFFFF
_TCP_LISTEN = 10
_NO_COOKIE = b"\xff" * 8
_REPLY_LIMIT = 8192

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_ID = struct.Struct("!HH16s16s")
_REPLY = struct.Struct("=BBBB")


def build_request(destination: Destination) -> bytes:
    """Ask for the socket that a connection from nowhere in particular to `destination` would reach."""
    local = socket.inet_pton(destination.family, destination.host)
    # The kernel calls our side the source: `idiag_src` is where the connection arrives (net/ipv4/inet_diag.c).
    identity = _ID.pack(destination.port, 0, local, bytes(16)) + struct.pack("=I", destination.scope) + _NO_COOKIE
    body = _REQUEST.pack(destination.family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE) + identity
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body


def is_wildcard_listener(reply: bytes) -> bool:
    """Whether the kernel's answer is a listening socket that is bound to every address."""
    if len(reply) < _HEADER.size + _REPLY.size + _ID.size or _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:
        return False
    state = _REPLY.unpack_from(reply, _HEADER.size)[1]
    bound = _ID.unpack_from(reply, _HEADER.size + _REPLY.size)[2]
    return bool(state == _TCP_LISTEN and not any(bound))


def serves_every_address(destination: Destination) -> bool:
    """Whether what listens at a destination of this host listens at all of its addresses.

    False when nothing listens there, and when the kernel cannot be asked: not dialling is safe.
    """
    try:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as netlink:
            netlink.send(build_request(destination))
            return is_wildcard_listener(netlink.recv(_REPLY_LIMIT))
    except OSError:
        return False
