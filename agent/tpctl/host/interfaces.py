"""Interfaces and addresses of this network namespace, without netlink: `tpctl install` should start quickly."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

from tpctl.host import routes
from tpctl.host.proc import NET, read_net
from tpctl.spec.policy import RESERVED, Address, Family
from tpctl.system import netlink, text

_SIOCGIFFLAGS = 0x8913
_SIOCGIFADDR = 0x8915
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
"""linux/sockios.h and net/if.h."""
_SYSCTLS = "/proc/sys/net/ipv6/conf"
"""Of the network namespace of the thread that opens it."""
_IFREQ = struct.Struct("16s24s")
_RTM_GETADDR = 22
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
"""rtnetlink(7); of a point-to-point interface, IFA_ADDRESS is the other end's."""


class InterfaceAddress(NamedTuple):
    """An IPv6 address of an interface."""

    address: IPv6Address
    interface: str


class HostAddress(NamedTuple):
    """An address of this host, and the interface that has it."""

    interface: str
    address: Address


def addresses() -> tuple[HostAddress, ...]:
    """The addresses of both families of every interface that is up; none when the kernel cannot be asked."""
    up = {number: text.decoded(os.fsencode(name)) for number, name in socket.if_nameindex()}
    up = {number: name for number, name in up.items() if is_up(name)}
    found = []
    try:
        with netlink.Netlink(netlink.ROUTE) as kernel:
            for message in kernel.ask(_RTM_GETADDR, _IFADDRMSG.pack(0, 0, 0, 0, 0), netlink.DUMP):
                number = _IFADDRMSG.unpack_from(message)[4]
                values = netlink.parse(message[_IFADDRMSG.size :])
                packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS, b"")
                if number in up and len(packed) in (4, 16):
                    found.append(HostAddress(up[number], ip_address(packed)))
    except OSError:
        return ()
    return tuple(found)


def loopback_name() -> str | None:
    """The name of the first loopback interface, or None when there is none."""
    return next((name for name in names() if is_loopback(name)), None)


def names() -> tuple[str, ...]:
    """The interfaces, in the kernel's order."""
    return tuple(text.decoded(os.fsencode(name)) for _, name in socket.if_nameindex())


def index(name: str) -> int:
    """The kernel's number of an interface. Raises OSError when there is none of that name."""
    return socket.if_nametoindex(os.fsdecode(text.encoded(name)))


def is_loopback(name: str) -> bool:
    """Whether an interface has IFF_LOOPBACK set; False when it does not exist."""
    reply = _ioctl(_SIOCGIFFLAGS, name)
    return reply is not None and bool(struct.unpack_from("=H", reply, 16)[0] & _IFF_LOOPBACK)


def _ioctl(request: int, name: str) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return fcntl.ioctl(probe, request, _IFREQ.pack(text.encoded(name), b""))
        except OSError:
            return None


def parse_if_inet6(listing: str) -> Iterator[InterfaceAddress]:
    """The addresses of /proc/net/if_inet6: address, index, prefix length, scope, flags, name."""
    for line in text.lines(listing):
        fields = text.words(line)
        if len(fields) == 6 and len(fields[0]) == 32:
            yield InterfaceAddress(IPv6Address(bytes.fromhex(fields[0])), fields[5])


def ipv6_addresses() -> tuple[InterfaceAddress, ...]:
    """Every IPv6 address of this namespace."""
    return tuple(parse_if_inet6(read_net("if_inet6")))


def speaks_ipv6(loopback: str) -> bool:
    """Whether the kernel has IPv6, and it is turned on for the loopback interface, where redirected connections end."""
    if not (NET / "if_inet6").exists():
        return False
    try:
        return Path(_SYSCTLS, os.fsdecode(text.encoded(loopback)), "disable_ipv6").read_text().strip() == "0"
    except OSError:
        return True  # /proc/sys is out of reach


def has_ipv6(loopback: str | None) -> bool:
    """Whether an interface other than loopback has an IPv6 address; a link-local one counts."""
    return any(not one.address.is_loopback and one.interface != loopback for one in ipv6_addresses())


def with_address(family: Family) -> tuple[str, ...]:
    """The interfaces that are up and have an address of a family, other than a link-local or a loopback one."""
    if family is Family.IPV4:
        found = (name for name in names() if not is_loopback(name) and _ioctl(_SIOCGIFADDR, name) is not None)
    else:
        found = (
            one.interface for one in ipv6_addresses() if not (one.address.is_link_local or one.address.is_loopback)
        )
    return tuple(name for name in dict.fromkeys(found) if is_up(name) and not is_loopback(name))


def is_up(name: str) -> bool:
    """Whether an interface has IFF_UP set; False when it does not exist."""
    reply = _ioctl(_SIOCGIFFLAGS, name)
    return reply is not None and bool(struct.unpack_from("=H", reply, 16)[0] & _IFF_UP)


def leads_to_loopback(name: str, family: Family) -> bool:
    """Whether the kernel delivers to 127.0.0.1 or ::1 what a socket sends that is bound to the interface."""
    loopback = RESERVED[family].local.network_address
    try:
        route = routes.route_to(loopback.packed, interface=index(name))
    except OSError:
        return False
    return route is not None and route.is_local
