"""Readers of what traffic is told apart by: ports, networks, interfaces, marks and users. See `tpctl.config.values`."""

from __future__ import annotations

import re
from ipaddress import IPv6Network, ip_network

from tpctl.config.values import BadValueError, Note, each, filled, items, quoted, whole_number
from tpctl.spec.exclusions import MAX_MARK, Interfaces, Mark
from tpctl.spec.policy import (
    ALL_PORTS,
    MAX_PORT,
    MAX_UID,
    Network,
    PortRange,
    Ports,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

AUTO = "auto"
MAX_INTERFACE_NAME = 15
"""IFNAMSIZ (net/if.h) without the terminating zero."""

_USUAL_LENGTH = {4: 16, 6: 64}
"""Of a bridge's network, by IP version: Docker's own."""


def read_ports(value: object, note: Note) -> Ports:
    """Ports and port ranges: a list, or a text with commas. Empty items are left out, as by kumactl."""
    return each(filled(value, note), read_port_range, note)


def read_port_range(value: object, note: Note) -> PortRange:
    """`80` or `1000-2000`."""
    first, dash, last = value.partition("-") if isinstance(value, str) else (value, "", value)
    low, high = whole_number(first), whole_number(last if dash else first)
    if low is None or high is None:
        raise BadValueError(f"{quoted(value)} is not a port (1-{MAX_PORT}) or a range such as 1000-2000")
    if not (1 <= low <= MAX_PORT and 1 <= high <= MAX_PORT):
        raise BadValueError(f"{quoted(value)} is not within the ports 1-{MAX_PORT}")
    if low > high:
        raise BadValueError(f"the range {low}-{high} is reversed; write {high}-{low}")
    return PortRange(low, high)


def read_networks(value: object, note: Note) -> tuple[Network, ...]:
    """Addresses and CIDR networks of either family: a list, or a text with commas.

    As by kumactl, empty items of a text are left out, and an entry of a list that is nothing but empty is refused.
    """
    if isinstance(value, list | tuple) and "" in value:
        raise BadValueError('"" is not an IP address or a network such as 10.0.0.0/8 or fd00::/8')
    return each(filled(value, note), read_network, note)


def read_network(value: object, note: Note) -> Network:
    """`10.0.0.0/8`, `fd00::/8`, or an address, which stands for itself alone. Host bits are cleared, with a note."""
    text = value.strip() if isinstance(value, str) else ""
    address, slash, prefix = text.partition("/")
    if not text or "%" in text or (slash and whole_number(prefix) is None):
        raise BadValueError(f"{quoted(value)} is not an IP address or a network such as 10.0.0.0/8 or fd00::/8")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise BadValueError(
            f"{quoted(value)} is not an IP address or a network such as 10.0.0.0/8 or fd00::/8"
        ) from None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        plain = network.network_address.ipv4_mapped
        length = f"/{network.prefixlen - 96}" if slash else ""
        raise BadValueError(f"{quoted(value)} is an IPv4 address written as IPv6; write {plain}{length}")
    if ip_network(address).network_address != network.network_address:
        note(f"{text} has host bits set; taken as {network}")
    return network


def is_interface_name(text: str) -> bool:
    """Whether an interface may be called so."""
    return _is_named(text) and len(text.encode()) <= MAX_INTERFACE_NAME


def _is_named(name: str) -> bool:
    """The same without a limit; neither the kernel nor the rules of any engine give these characters a meaning."""
    return bool(name) and name not in (".", "..") and not re.search(r"[\s/+!\"'\\]", name) and name.isprintable()


def read_interfaces(value: object, note: Note) -> tuple[Interfaces, ...]:
    """Names of interfaces, there or not: a list, or a text with commas."""
    return each(items(value), _read_interfaces, note)


def _read_interfaces(value: object, note: Note) -> Interfaces:
    pattern = value.strip() if isinstance(value, str) else ""
    if not _is_named(pattern.removesuffix("+")):
        raise BadValueError(f"{quoted(value)} is not the name of an interface, such as tun0, or wg+ for several")
    if len(pattern.encode()) > MAX_INTERFACE_NAME:
        raise BadValueError(f"{quoted(value)} is longer than {MAX_INTERFACE_NAME} characters")
    return Interfaces(pattern)


def read_marks(value: object, note: Note) -> tuple[Mark, ...] | str:
    """Marks of sockets: a list, or a text with commas; `none`, or `auto`."""
    given = items(value)
    if given in ([AUTO], ["none"]):
        return AUTO if given == [AUTO] else ()
    return each(given, read_mark, note)


def read_mark(value: object, note: Note) -> Mark:
    """`0x80000/0xff0000`, or a mark alone; hexadecimal or decimal. Bits outside the mask are cleared, with a note."""
    text, slash, mask_text = value.partition("/") if isinstance(value, str) else (value, "", "")
    bits, mask = read_mark_number(text), read_mark_number(mask_text) if slash else MAX_MARK
    if bits is None or mask is None:
        raise BadValueError(f"{quoted(value)} is not a mark of at most 32 bits, such as 0x80000/0xff0000 or 51820")
    if not bits & mask:
        raise BadValueError(
            f"{quoted(value)} would exclude every connection without a mark, because what is left of the mark is 0"
        )
    if bits & ~mask:
        note(f"{quoted(value)} has bits outside its mask; taken as {Mark(bits & mask, mask)}")
    return Mark(bits & mask, mask)


def read_mark_number(value: object) -> int | None:
    """A number of at most 32 bits, in decimal or, after 0x, hexadecimal digits; None for anything else.

    A decimal number that begins with 0 is none: iptables and ip-rule(8) read it as octal.
    """
    if isinstance(value, str) and (found := re.fullmatch(r"0[xX]([0-9a-fA-F]{1,16})", value.strip())):
        bits: int | None = int(found[1], 16)
    elif isinstance(value, str) and re.match(r"0[0-9]", value.strip()):
        bits = None
    else:
        bits = whole_number(value)
    return bits if bits is not None and 0 <= bits <= MAX_MARK else None


def read_virtual_networks(value: object, note: Note) -> tuple[VirtualNetwork, ...]:
    """Virtual networks: a list, or a text with commas."""
    return each(items(value), read_virtual_network, note)


def read_virtual_network(value: object, note: Note) -> VirtualNetwork:
    """`docker0:172.17.0.0/16`, `br+:172.18.0.0/16` or `docker0:fd00::/64`. The length must be there, as for kumactl."""
    shape = "write INTERFACE[+]:CIDR, as in docker0:172.17.0.0/16"
    interface, colon, cidr = value.partition(":") if isinstance(value, str) else ("", "", "")
    interface = interface.strip()
    if not colon or not cidr.strip():
        raise BadValueError(f"{quoted(value)} is not a virtual network; {shape}")
    if not _is_named(interface.removesuffix("+")):
        raise BadValueError(f"{quoted(value)} does not begin with the name of an interface; {shape}")
    if len(interface.encode()) > MAX_INTERFACE_NAME:
        raise BadValueError(f"{quoted(value)}: the interface name is longer than {MAX_INTERFACE_NAME} characters")
    try:
        network = read_network(cidr.strip(), note)
    except BadValueError as bad:
        raise BadValueError(f"{quoted(value)}: {problem}" for problem in bad.problems) from None
    if "/" not in cidr:
        raise BadValueError(
            f"{quoted(value)} has no length, and one address is not a network of containers; write that of the bridge, "
            f"as in {interface}:{cidr.strip()}/{_USUAL_LENGTH[network.version]}"
        )
    return VirtualNetwork(interface, network)


def read_uid_exclusions(value: object, note: Note) -> tuple[UidExclusion, ...]:
    """Exclusions by user: a list, or a text with `;` or white space between them (a comma is part of one)."""
    texts = [item for item in re.split(r"[;\s]+", value) if item] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        texts = [texts]
    return tuple(rule for rules in each(texts, read_uid_exclusion, note) for rule in rules)


def read_uid_exclusion(value: object, note: Note) -> tuple[UidExclusion, ...]:
    """`[protocols:][ports:]uids`; one exclusion a protocol, TCP first."""
    if whole_number(value) is None and (not isinstance(value, str) or not value.strip()):
        raise BadValueError(f"{quoted(value)} is not an exclusion; write [PROTOCOLS:][PORTS:]UIDS, as in udp:53:1000")
    parts = str(value).strip().split(":")
    if len(parts) > 3:
        raise BadValueError(f"{quoted(value)} has too many parts; write [PROTOCOLS:][PORTS:]UIDS, as in udp:53:1000")
    protocols, ports, uids = ["*"] * (3 - len(parts)) + parts
    try:
        return tuple(
            UidExclusion(protocol, _exclusion_ports(ports, note), _exclusion_uids(uids))
            for protocol in _exclusion_protocols(protocols, note)
        )
    except BadValueError as bad:
        raise BadValueError(f"{quoted(value)}: {problem}" for problem in bad.problems) from None


def _exclusion_protocols(text: str, note: Note) -> tuple[Protocol, ...]:
    if text.strip() in ("", "*"):
        return tuple(Protocol)
    words = [word.strip().lower() for word in filled(text, note)]
    unknown = [word for word in words if word not in tuple(Protocol)]
    if unknown:
        raise BadValueError(f"{quoted(word)} is not a protocol; use tcp, udp, or * for both" for word in unknown)
    return tuple(protocol for protocol in Protocol if protocol in words)


def _exclusion_ports(text: str, note: Note) -> Ports:
    if text.strip() in tuple(Protocol):
        raise BadValueError(f"{quoted(text)} is in the place of the ports; write {text.strip()}:*:UIDS")
    # kumactl takes empty items, and iptables then refuses them when its old rules are gone.
    return (ALL_PORTS,) if text.strip() in ("", "*") else each(items(text), read_port_range, note)


def _exclusion_uids(text: str) -> UidRange:
    if text.strip() == "*":
        raise BadValueError(
            f"* is not allowed for uids, because it would exclude everything; use a range such as 0-{MAX_UID}"
        )
    first, dash, last = text.strip().partition("-")
    low, high = whole_number(first), whole_number(last if dash else first)
    if low is None or high is None:
        raise BadValueError(f"{quoted(text)} is not a uid or a range of uids such as 1000-1999")
    if low > MAX_UID or high > MAX_UID:
        raise BadValueError(f"{quoted(text)} is not within the uids 0-{MAX_UID}")
    if low > high:
        raise BadValueError(f"the range {low}-{high} is reversed; write {high}-{low}")
    return UidRange(low, high)
