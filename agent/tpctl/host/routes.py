"""How the kernel routes an address: whether it is this host's own, and which way it goes.

The kernel is asked about one address at a time, as `ip route get` does (RTM_GETROUTE, rtnetlink(7)): as a socket of
this host would ask, with no mark. So policy routing (ip-rule(8)) counts, and so do prefixes that are local as a whole
(AnyIP). What does not count is a `local default` route in a table to which only marked packets are sent, as transparent
proxies have one, tpctl's own among them. A bind() would answer too, but wrongly where net.ipv4.ip_nonlocal_bind is set.

The messages are made by hand: to import a netlink library takes 140 ms, and the relay asks in the middle of its event
loop. An answer takes 30 microseconds, however many routes there are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NamedTuple

from tpctl.spec.policy import Address, Family, Network
from tpctl.system import netlink, text

_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_RTM_F_LOOKUP_TABLE = 0x1000
"""Tell the table in which the route was found (Linux 4.4)."""
_RTM_F_FIB_MATCH = 0x2000
"""Tell the route as the table has it (Linux 4.13; IPv6: 4.20)."""
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_TABLE, _RTA_MARK, _RTA_VIA, _RTA_UID = 15, 16, 18, 25
_RTN_UNICAST, _RTN_LOCAL = 1, 2
"""linux/rtnetlink.h: the packet goes to somebody else, or is delivered to this host."""
_TABLE_LOCAL = 255
_LOCAL_TABLES = frozenset({254, _TABLE_LOCAL})
"""The tables main and local, which the kernel keeps as one, and calls main, until somebody adds a rule (ip-rule(8))."""
_NO_ANSWER = frozenset({errno.ENOMEM, errno.ENOBUFS, errno.EPERM, errno.EOPNOTSUPP, errno.EAFNOSUPPORT})
"""Errors that say nothing about the address. Every other one says that nothing gets there (ip-route(8), "TYPE")."""

_NO_TABLE = frozenset({errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP})
"""What the kernel says of a table that it does not have, or a family."""

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_NUMBER = struct.Struct("=I")
_ERROR = struct.Struct("=i")
_REPLY_LIMIT = 8192


class Route(NamedTuple):
    """The way of a packet from this host."""

    family: int
    kind: int
    """rtm_type."""
    table: int
    interface: int
    """The index of the interface it leaves by, of lo when it stays here; 0 when the kernel names none."""
    packed_source: bytes
    has_router: bool

    @property
    def source(self) -> Address | None:
        """The address the kernel would send from."""
        return ip_address(self.packed_source) if len(self.packed_source) in (4, 16) else None

    @property
    def is_local(self) -> bool:
        """Whether it is delivered to this host."""
        return self.kind == _RTN_LOCAL

    @property
    def is_near(self) -> bool:
        """Whether it is delivered to this host, or gets there without a router."""
        return self.is_local or (self.kind == _RTN_UNICAST and not self.has_router)

    @property
    def matches_local(self) -> bool:
        """Whether rules take the address for this host's own: `fib daddr type local`, and iptables' addrtype.

        Of IPv4 they ask the table local alone (inet_dev_addr_type() in net/ipv4/fib_frontend.c), although ip-rule(8)
        may deliver a packet to this host by another table. IPv6 they route (net/ipv6/netfilter/nft_fib_ipv6.c).
        """
        return self.is_local and (self.family == socket.AF_INET6 or self.table in _LOCAL_TABLES)


def route_to(packed: bytes, *, interface: int = 0, uid: int | None = None, mark: int = 0) -> Route | None:
    """The route to an address, given as socket.inet_pton makes it; None when nothing gets there.

    `interface` is the index of the one it has to leave by, which a link-local address needs; `uid` is who sends, by
    default the caller, and `mark` the mark of the socket. Raises OSError when the kernel cannot be asked.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as kernel:
        kernel.send(build_request(packed, interface=interface, uid=uid, mark=mark))
        return parse_reply(kernel.recv(_REPLY_LIMIT))


def matched_length(packed: bytes) -> int:
    """The prefix length of the route that an address is sent by, as its table has it; 0 when nothing gets there.

    Raises OSError when the kernel cannot be asked.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as kernel:
        kernel.send(build_request(packed, flags=_RTM_F_LOOKUP_TABLE | _RTM_F_FIB_MATCH))
        reply = kernel.recv(_REPLY_LIMIT)
    return 0 if parse_reply(reply) is None else int(_ROUTE.unpack_from(reply, _HEADER.size)[1])


def to_address(address: Address, *, uid: int | None = None, mark: int = 0) -> Route | None:
    """The route to an address, by the interface that it may name; None when nothing gets there, or nobody can tell."""
    try:
        return route_to(address.packed, interface=_scope(address), uid=uid, mark=mark)
    except OSError:
        return None


def is_unreachable(address: Address, *, uid: int | None = None, mark: int = 0) -> bool:
    """Whether the kernel says that nothing gets there; where it cannot be asked, nobody knows of anything."""
    try:
        return route_to(address.packed, interface=_scope(address), uid=uid, mark=mark) is None
    except OSError:
        return False


def _scope(address: Address) -> int:
    """The index of the interface that an address names; 0 when it names none. Raises OSError when there is none."""
    scope = address.scope_id if isinstance(address, IPv6Address) else None
    return socket.if_nametoindex(scope) if scope else 0


def is_local(address: Address) -> bool:
    """Whether what this host sends to the address is delivered to this host itself.

    Loopback addresses are, also while the interface lo is down, when the kernel knows no route to them.
    """
    if address.is_loopback:
        return True
    found = to_address(address)
    return found is not None and found.is_local


def matches_local(address: Address) -> bool:
    """Whether rules take the address for this host's own, see `Route.matches_local`."""
    if address.is_loopback:
        return True
    found = to_address(address)
    return found is not None and found.matches_local


def interface_name(index: int) -> str | None:
    """The name of an interface; None when there is none of that index."""
    try:
        return text.decoded(os.fsencode(socket.if_indextoname(index)))
    except OSError:
        return None


class TableRoute(NamedTuple):
    """A route as a routing table holds it."""

    kind: int
    """rtm_type."""
    protocol: int
    """Who made it (rtm_protocol)."""
    prefix_length: int
    destination: bytes = b""
    """Packed; empty for every address."""
    interface: int = 0
    """The index of the one it leaves by; 0 when it names none."""
    metric: int = 0


def of_table(family: int, table: int) -> list[TableRoute]:
    """The routes of one routing table; none when the kernel does not have it, or the family.

    The kernel leaves the other tables out (NETLINK_GET_STRICT_CHK, Linux 4.20); where it cannot, that is done here.
    Raises OSError when it cannot be asked.
    """
    body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + netlink.attributes({_RTA_TABLE: table})
    routes = []
    with netlink.Netlink(netlink.ROUTE) as kernel:
        with contextlib.suppress(OSError):
            kernel.be_strict()
        try:
            for message in kernel.ask(_RTM_GETROUTE, body, netlink.DUMP):
                its_family, length, _, _, where, protocol, _, kind, _ = _ROUTE.unpack_from(message)
                found = netlink.parse(message[_ROUTE.size :])
                if its_family == family and _number(found.get(_RTA_TABLE), where) == table:
                    index, metric = (_number(found.get(one), 0) for one in (_RTA_OIF, _RTA_PRIORITY))
                    routes.append(TableRoute(kind, protocol, length, found.get(_RTA_DST, b""), index, metric))
        except OSError as error:
            if error.errno not in _NO_TABLE:
                raise
    return routes


def local_networks(family: Family) -> tuple[Network, ...]:
    """This host's own addresses and prefixes, as the table `local` holds them; none when it cannot be read."""
    version, length = (socket.AF_INET, 4) if family is Family.IPV4 else (socket.AF_INET6, 16)
    try:
        held = of_table(version, _TABLE_LOCAL)
    except OSError:
        return ()
    found = (
        ip_network((route.destination.ljust(length, b"\0"), route.prefix_length), strict=False)
        for route in held
        if route.kind == _RTN_LOCAL
    )
    return tuple(dict.fromkeys(found))


def local_prefixes(family: Family) -> tuple[Network, ...]:
    """Those of them that are more than one address, such as AnyIP has; without loopback's."""
    found = (one for one in local_networks(family) if one.prefixlen < one.max_prefixlen and not one.is_loopback)
    return tuple(found)


def build_request(
    packed: bytes, *, interface: int = 0, uid: int | None = None, mark: int = 0, flags: int = _RTM_F_LOOKUP_TABLE
) -> bytes:
    """An RTM_GETROUTE message that asks for the route to an address."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, flags)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    for kind, value in ((_RTA_OIF, interface or None), (_RTA_UID, uid), (_RTA_MARK, mark or None)):
        if value is not None:
            body += _ATTRIBUTE.pack(_ATTRIBUTE.size + _NUMBER.size, kind) + _NUMBER.pack(value)
    return _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body


def parse_reply(reply: bytes) -> Route | None:
    """The route of the kernel's answer; None when it says that there is none. Raises OSError for any other answer."""
    if len(reply) >= _HEADER.size + _ERROR.size and _HEADER.unpack_from(reply)[1] == _NLMSG_ERROR:
        number = -_ERROR.unpack_from(reply, _HEADER.size)[0]
        if number in _NO_ANSWER:
            raise OSError(number, os.strerror(number))
        return None
    if len(reply) < _HEADER.size + _ROUTE.size:
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    family, _, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(reply, _HEADER.size)
    found = _attributes(reply)
    return Route(
        family=family,
        kind=kind,
        table=_number(found.get(_RTA_TABLE), table),
        interface=_number(found.get(_RTA_OIF), 0),
        packed_source=found.get(_RTA_PREFSRC, b""),
        has_router=_RTA_GATEWAY in found or _RTA_VIA in found,
    )


def _attributes(reply: bytes) -> dict[int, bytes]:
    found, at = dict[int, bytes](), _HEADER.size + _ROUTE.size
    while at + _ATTRIBUTE.size <= len(reply):
        size, kind = _ATTRIBUTE.unpack_from(reply, at)
        found[kind] = reply[at + _ATTRIBUTE.size : at + size]
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
    return found


def _number(value: bytes | None, default: int) -> int:
    return default if value is None or len(value) < _NUMBER.size else int(_NUMBER.unpack_from(value)[0])
