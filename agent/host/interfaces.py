"""Interfaces and addresses of this network namespace, without netlink: `tpctl install` should start quickly."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from agent.host.proc import read_net
from agent.policy import Address, Network

_SIOCGIFFLAGS = 0x8913
_SIOCGIFADDR = 0x8915
_IFF_LOOPBACK = 0x8
"""linux/sockios.h and net/if.h."""
_IFREQ = struct.Struct("16s24s")


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An IPv6 address of an interface."""

    address: IPv6Address
    interface: str


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel would reach a destination."""

    source: Address
    interface: str


def loopback_name() -> str | None:
    """The name of the first loopback interface, or None when there is none."""
    return next((name for name in names() if is_loopback(name)), None)


def names() -> tuple[str, ...]:
    """The interfaces, in the kernel's order."""
    return tuple(name for _, name in socket.if_nameindex())


def is_loopback(name: str) -> bool:
    """Whether an interface has IFF_LOOPBACK set; False when it does not exist."""
    reply = _ioctl(_SIOCGIFFLAGS, name)
    return reply is not None and bool(struct.unpack_from("=H", reply, 16)[0] & _IFF_LOOPBACK)


def _ioctl(request: int, name: str) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return fcntl.ioctl(probe, request, _IFREQ.pack(name.encode(), b""))
        except OSError:
            return None


def parse_if_inet6(text: str) -> Iterator[InterfaceAddress]:
    """The addresses of /proc/net/if_inet6: address, index, prefix length, scope, flags, name."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 6 and len(fields[0]) == 32:
            yield InterfaceAddress(IPv6Address(bytes.fromhex(fields[0])), fields[5])


def ipv6_addresses() -> tuple[InterfaceAddress, ...]:
    """Every IPv6 address of this namespace."""
    return tuple(parse_if_inet6(read_net("if_inet6")))


def has_ipv6(loopback: str | None) -> bool:
    """Whether an interface other than loopback has an IPv6 address; a link-local one counts."""
    return any(not one.address.is_loopback and one.interface != loopback for one in ipv6_addresses())


def parse_fib_trie(text: str) -> Iterator[IPv4Network]:
    """The local networks of /proc/net/fib_trie: for each leaf `|-- ADDRESS`, its `/LENGTH host LOCAL` lines."""
    leaf = ""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            leaf = words[1]
        elif len(words) >= 3 and words[0].startswith("/") and words[2] == "LOCAL":
            yield IPv4Network(f"{leaf}{words[0]}", strict=False)


def local_networks() -> tuple[Network, ...]:
    """What the kernel delivers to this host itself, like `fib daddr type local`: its own addresses and 127.0.0.0/8."""
    four: dict[Network, None] = dict.fromkeys(parse_fib_trie(read_net("fib_trie")))
    six: tuple[IPv6Network, ...] = tuple(IPv6Network(one.address) for one in ipv6_addresses())
    # Loopback counts as local even in a namespace whose lo is down, where the kernel lists nothing.
    return (ip_network("127.0.0.0/8"), ip_network("::1/128"), *four, *six)


def route_to(destination: Address) -> Route | None:
    """The source address and interface the kernel would use, or None when there is no route. Sends nothing."""
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(destination), 9))
            source = ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None
    interface = _interface_of(source)
    return Route(source, interface) if interface else None


def _interface_of(address: Address) -> str | None:
    for one in ipv6_addresses():
        if one.address == address:
            return one.interface
    for name in names():
        reply = _ioctl(_SIOCGIFADDR, name)
        # struct sockaddr_in after the name: family, port, address
        if reply is not None and ip_address(reply[20:24]) == address:
            return name
    return None
