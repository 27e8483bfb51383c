"""Whether an address is one of this host's own: the kernel's routing answers, so nothing has to be kept up to date.

A bind() would answer too, but wrongly where net.ipv4.ip_nonlocal_bind is set. One netlink message by hand instead of
pyroute2: a worker asks in the middle of its event loop, where 140 ms to import a library would stall every connection.
"""

from __future__ import annotations

import socket
import struct

from agent.relay.original_destination import Destination

_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY, _RTA_VIA = 5, 18
_NLMSG_ERROR = 2
_RTN_UNICAST, _RTN_LOCAL = 1, 2
"""linux/rtnetlink.h: the packet goes to somebody else, or is delivered to this host."""

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_REPLY_LIMIT = 8192


def build_request(destination: Destination) -> bytes:
    """An RTM_GETROUTE message that asks for the route to an address."""
    address = socket.inet_pton(destination.family, destination.host)
    body = _ROUTE.pack(destination.family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address), _RTA_DST) + address
    if destination.scope:
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _RTA_OIF) + struct.pack("=I", destination.scope)
    return _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body


def is_local_reply(reply: bytes) -> bool:
    """Whether the kernel's answer says that the address is this host's own. No route at all means that it is not."""
    return _kind(reply) == _RTN_LOCAL


def is_near_reply(reply: bytes) -> bool:
    """Whether it says that the address is this host's own, or is reached without a router."""
    kind = _kind(reply)
    return kind == _RTN_LOCAL or (kind == _RTN_UNICAST and not {_RTA_GATEWAY, _RTA_VIA} & _attributes(reply))


def _kind(reply: bytes) -> int | None:
    if len(reply) < _HEADER.size + _ROUTE.size or _HEADER.unpack_from(reply)[1] == _NLMSG_ERROR:
        return None
    return int(_ROUTE.unpack_from(reply, _HEADER.size)[7])


def _attributes(reply: bytes) -> set[int]:
    found, at = set(), _HEADER.size + _ROUTE.size
    while at + _ATTRIBUTE.size <= len(reply):
        size, kind = _ATTRIBUTE.unpack_from(reply, at)
        found.add(kind)
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
    return found


def is_local(destination: Destination) -> bool:
    """Whether connecting to the address stays on this host. True if nobody can tell: not dialling is safe."""
    reply = _asked(destination)
    return reply is None or is_local_reply(reply)


def is_surely_local(destination: Destination) -> bool:
    """The same, but False when the kernel cannot be asked: for whom something is admitted that others are refused."""
    reply = _asked(destination)
    return reply is not None and is_local_reply(reply)


def is_near(host: str) -> bool:
    """Whether an address is this host's own, or is reached without a router. True when the kernel cannot be asked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reply = _asked(Destination(host.partition("%")[0], 0, family))
    return reply is None or is_near_reply(reply)


def _asked(destination: Destination) -> bytes | None:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
            netlink.send(build_request(destination))
            return netlink.recv(_REPLY_LIMIT)
    except OSError:
        return None
