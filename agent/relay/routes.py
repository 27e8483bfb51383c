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
_NLMSG_ERROR = 2
_RTN_LOCAL = 2
"""linux/rtnetlink.h: the packet is delivered to this host."""

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
    if len(reply) < _HEADER.size + _ROUTE.size:
        return False
    if _HEADER.unpack_from(reply)[1] == _NLMSG_ERROR:
        return False
    return bool(_ROUTE.unpack_from(reply, _HEADER.size)[7] == _RTN_LOCAL)


def is_local(destination: Destination) -> bool:
    """Whether connecting to the address stays on this host. True if nobody can tell: not dialling is safe."""
    return _asked(destination) is not False


def is_surely_local(destination: Destination) -> bool:
    """The same, but False when the kernel cannot be asked: for whom something is admitted that others are refused."""
    return _asked(destination) is True


def _asked(destination: Destination) -> bool | None:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
            netlink.send(build_request(destination))
            return is_local_reply(netlink.recv(_REPLY_LIMIT))
    except OSError:
        return None
