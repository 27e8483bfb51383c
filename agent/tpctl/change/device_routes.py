"""Routes by which a socket that is bound to an interface reaches the data plane on the loopback addresses.

SO_BINDTODEVICE (socket(7)) binds a socket to an interface, and since Linux 5.7 any user may. A redirect makes 127.0.0.1
or ::1 of the destination, and the kernel then looks for a way there that keeps to the interface
(ip_route_me_harder() in net/ipv4/netfilter.c). It finds none: IPv4 takes the address for a neighbour's, and the packet
leaves on the wire. A host's own addresses, however, are reached from such a socket, because their routes of type local
name the interface; what takes such a route is delivered over lo. So every interface gets one to each of the two
loopback addresses, in the table local. Nothing else changes:

- A lookup that is not tied to an interface finds the kernel's own routes over lo, whose metric is lower.
- What arrives from outside for these addresses is dropped before any table is asked.

The metric is one that nobody else has, and tells that a route is ours. The protocol is the kernel's, as programs that
manage interfaces take away the routes that they do not know (networkd.conf(5), ManageForeignRoutes=), but not those.
A route goes when its interface goes, and that of IPv6 when the interface is set down.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from tpctl.host import interfaces, routes
from tpctl.spec.policy import Family, Policy
from tpctl.system import netlink
from tpctl.system.errors import ApplyError
from tpctl.system.netlink import Netlink

METRIC = 0x70000000
"""With the interface's index added: routes to the same address must differ in it."""
_TABLE_LOCAL = 255
_RTN_LOCAL = 2
_SCOPE_HOST = 254
_RTPROT_KERNEL = 2
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 6, 15
_ROUTE = struct.Struct("=BBBBBBBBI")
"""rtnetlink(7), struct rtmsg"""
_ADDRESS = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
_AF = {Family.IPV4: 2, Family.IPV6: 10}
_UNABLE = (errno.EEXIST, errno.ENODEV, errno.EACCES, errno.ENETDOWN, errno.EINVAL, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
"""There is one, or the interface has gone, is down, or does without IPv6."""


@dataclass(frozen=True, slots=True, order=True)
class DeviceRoute:
    """One of the routes."""

    family: Family
    index: int
    """Of the interface."""

    @property
    def message(self) -> bytes:
        """The message that adds or removes it."""
        packed = ip_address(_ADDRESS[self.family]).packed
        kind = _ROUTE.pack(
            _AF[self.family], 8 * len(packed), 0, 0, _TABLE_LOCAL, _RTPROT_KERNEL, _SCOPE_HOST, _RTN_LOCAL, 0
        )
        where = {_RTA_OIF: self.index, _RTA_PRIORITY: METRIC + self.index, _RTA_TABLE: _TABLE_LOCAL}
        return kind + netlink.attributes({_RTA_DST: packed, **where})


def needed(policy: Policy) -> frozenset[Family]:
    """The families in which a policy redirects to a loopback address."""
    return frozenset(family for family in Family if policy.redirects_own(family))


def lacking(policy: Policy) -> tuple[str, ...]:
    """The interfaces from which a redirected connection of a bound socket would not reach the data plane.

    Those without an address of the family are left out: nobody binds a socket to the port of a bridge. So are excluded
    ones: what leaves by them is not redirected.
    """
    return tuple(
        dict.fromkeys(
            name
            for family in sorted(needed(policy))
            for name in interfaces.with_address(family)
            if name != policy.loopback and not policy.excludes(name)
            if not interfaces.leads_to_loopback(name, family)
        )
    )


def is_present() -> bool:
    """Whether a bound socket reaches a loopback address anywhere; cheap, unlike asking whether the route is ours."""
    names = [name for name in interfaces.names() if not interfaces.is_loopback(name)]
    return any(interfaces.leads_to_loopback(name, family) for family in Family for name in names)


def add(loopback: str, families: Iterable[Family]) -> None:
    """Give every interface but loopback the routes that it lacks.

    Raises ApplyError when the kernel refuses for another reason than that an interface cannot have one.
    """
    others = [index for index, name in socket.if_nameindex() if name != loopback]
    _add(DeviceRoute(family, index) for family in sorted(families) for index in others)


def restore(routes_then: frozenset[DeviceRoute]) -> None:
    """Have those routes again that `held` found, and no others of ours. Raises ApplyError when the kernel refuses."""
    _add(sorted(routes_then))
    remove(held() - routes_then)


def _add(wanted: Iterable[DeviceRoute]) -> None:
    with _netlink("add") as kernel:
        there = held()
        for route in wanted:
            if route not in there:
                _add_if_possible(kernel, route)


def remove(chosen: Iterable[DeviceRoute] | None = None, *, dry_run: bool = False) -> tuple[str, ...]:
    """Take some of the routes away, or all; hands back what went, or would. Raises ApplyError when it cannot."""
    removed = []
    names = dict(socket.if_nameindex())
    with _netlink("remove") as kernel:
        there = held()
        for route in sorted(there if chosen is None else there & frozenset(chosen)):
            version = "" if route.family is Family.IPV4 else "-6 "
            name = names.get(route.index, f"if{route.index}")
            removed.append(f"ip {version}route local {_ADDRESS[route.family]} dev {name} table local")
            if not dry_run:
                kernel.change(_RTM_DELROUTE, route.message)
    return tuple(removed)


def held() -> frozenset[DeviceRoute]:
    """Our routes that the kernel holds; a family that it does not have holds none."""
    return frozenset(
        DeviceRoute(family, route.interface)
        for family in Family
        for route in routes.of_table(_AF[family], _TABLE_LOCAL)
        if route.kind == _RTN_LOCAL
        and route.interface
        and route.metric == METRIC + route.interface
        and route.destination == ip_address(_ADDRESS[family]).packed
    )


def _add_if_possible(kernel: Netlink, route: DeviceRoute) -> None:
    try:
        kernel.change(_RTM_NEWROUTE, route.message, netlink.CREATE | netlink.EXCLUSIVE)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


@contextlib.contextmanager
def _netlink(verb: str) -> Iterator[Netlink]:
    try:
        with Netlink(netlink.ROUTE) as kernel:
            yield kernel
    except OSError as error:
        text = f"cannot {verb} the routes to the loopback addresses of table local: {error.strerror}"
        raise ApplyError(text) from error
