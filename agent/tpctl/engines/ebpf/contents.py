"""What the maps of bpf/types.c hold for a policy. Pure: bytes by map, by key."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, summarize_address_range

import tpctl
from tpctl.spec.exclusions import Mark
from tpctl.spec.policy import (
    DNS_PORT,
    Address,
    DnsCapture,
    Family,
    Network,
    Policy,
    Ports,
    Protocol,
    UidExclusion,
    WhenProxyDown,
    includes,
)
from tpctl.system.errors import InputError

Entries = Mapping[bytes, bytes]

_SETTINGS = struct.Struct("=QIIHHHH")
_INDEX = struct.Struct("=I")
_PORTS_BYTES = 8192
_MAPPED = bytes(10) + b"\xff\xff"
_INBOUND_LIST, _OUTBOUND_LIST = 0, 1
_EXCLUDED_DESTINATIONS, _EXCLUDED_SOURCES, _LOCAL_NETWORKS = 0, 2, 4
_LIST_BITS = 32
_MARK = struct.Struct("=II")
_MAX_MARKS = 32
"""MAX_MARKS of bpf/types.c: the programs compare them one by one."""
_NO_MARK = (1, 0)
"""A value outside its mask, which no mark has."""
_FLAGS = (
    "ipv4", "ipv6", "inbound", "inbound_include", "outbound", "outbound_include", "dns_ipv4", "dns_ipv6", "dns_all",
    "dns_tcp", "bypass", "containers", "guard",
)  # fmt: skip
"""In the order of their bits in bpf/types.c."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`struct settings`."""

    proxy_uid: int
    flags: frozenset[str]
    inbound_port: int
    outbound_port: int
    dns_port: int
    version: str = tpctl.__version__
    """The tpctl that wrote them."""

    def pack(self, netns: int) -> bytes:
        """The map's one value; `netns` is what the kernel knows the network namespace by."""
        flags = sum(1 << number for number, name in enumerate(_FLAGS) if name in self.flags)
        ports = (self.inbound_port, self.outbound_port, self.dns_port)
        return _SETTINGS.pack(netns, self.proxy_uid, flags, *ports, _packed_version(self.version))

    @classmethod
    def unpack(cls, raw: bytes) -> tuple[Settings, int]:
        """The opposite of `pack`."""
        netns, uid, bits, inbound, outbound, dns, version = _SETTINGS.unpack(raw)
        flags = frozenset(name for number, name in enumerate(_FLAGS) if bits >> number & 1)
        return cls(uid, flags, inbound, outbound, dns, _version(version)), netns


def _packed_version(version: str) -> int:
    """Four bits, six and six: 1.2.3 is 0x1083."""
    major, minor, patch = (int(part) for part in version.split("."))
    return major << 12 | minor << 6 | patch


def _version(packed: int) -> str:
    return f"{packed >> 12}.{packed >> 6 & 63}.{packed & 63}"


@dataclass(frozen=True, slots=True)
class Contents:
    """The policy maps."""

    settings: Settings
    ports: Entries
    networks: Entries
    users: Entries
    servers: Entries
    marks: Entries

    def entries(self, name: str, netns: int) -> Entries:
        """Everything in one of the policy maps."""
        if name == "settings":
            return {_INDEX.pack(0): self.settings.pack(netns)}
        found: Entries = getattr(self, name)
        return found

    def sizes(self) -> dict[str, int]:
        """How many entries each map must hold. A map cannot have room for none."""
        return {name: max(1, len(getattr(self, name))) for name in ("ports", "networks", "users", "servers")}


def contents_for(policy: Policy, local: Iterable[Network] = ()) -> Contents:
    """The maps for a policy on a host to which these networks are local as a whole (AnyIP).

    Its single addresses the programs find by themselves. Raises InputError when eBPF cannot carry the policy out.
    """
    if policy.log_level is not None:
        raise InputError(
            "--iptables-logs: eBPF programs cannot write to the kernel's log; use --engine nftables or "
            "--engine iptables"
        )
    if policy.inbound.is_transparent:
        raise InputError(
            "--inbound-mode tproxy: eBPF programs never change the destination of inbound packets, but they cannot "
            "bring the application's answers to a client's address back to the data plane; use --engine nftables or "
            "--engine iptables"
        )
    if policy.exclude_interfaces:
        raise InputError(
            "--exclude-interfaces: eBPF programs see a connection before its route is chosen, and so not by which "
            "interface it will leave; use --engine nftables or --engine iptables"
        )
    marks = policy.outbound.exclude_marks
    if len(marks) > _MAX_MARKS:
        raise InputError(
            f"--exclude-outbound-marks: {len(marks)} marks, and the eBPF programs compare at most {_MAX_MARKS}; give "
            "a mask that covers several, or use --engine nftables or --engine iptables"
        )
    users, port_lists = _users(policy.outbound.exclude_uids)
    inbound, outbound = policy.inbound, policy.outbound
    lists = (
        _bits(inbound.include_ports or inbound.exclude_ports),
        _bits(outbound.include_ports or outbound.exclude_ports),
        *port_lists,
    )
    return Contents(
        Settings(policy.proxy_uid, frozenset(_flags(policy)), inbound.port, outbound.port, policy.dns.port),
        {_INDEX.pack(number): bits.to_bytes(_PORTS_BYTES, "little") for number, bits in enumerate(lists)},
        dict(_networks(policy, local)),
        users,
        {_packed(server.address): _INDEX.pack(1) for family in Family for server in policy.servers(family)},
        {_INDEX.pack(0): _packed_marks(marks)},
    )


def _flags(policy: Policy) -> set[str]:
    dns = policy.dns
    wanted = {
        "ipv4": Family.IPV4 in policy.families,
        "ipv6": Family.IPV6 in policy.families,
        "inbound": policy.inbound.enabled,
        "inbound_include": bool(policy.inbound.include_ports),
        "outbound": policy.outbound.enabled,
        "outbound_include": bool(policy.outbound.include_ports),
        "dns_ipv4": policy.captures_dns(Family.IPV4),
        "dns_ipv6": policy.captures_dns(Family.IPV6),
        "dns_all": dns.capture is DnsCapture.ALL,
        "dns_tcp": dns.tcp,
        "bypass": policy.when_proxy_down is WhenProxyDown.BYPASS,
        "containers": bool(policy.virtual_networks),
        "guard": policy.guard_ports,
    }
    return {name for name, value in wanted.items() if value}


def _bits(ports: Ports) -> int:
    """Ports as a number with a bit for each."""
    bits = 0
    for item in ports:
        bits |= ((1 << (item.last - item.first + 1)) - 1) << item.first
    return bits


def _packed_marks(marks: tuple[Mark, ...]) -> bytes:
    held = [(mark.value, mark.mask) for mark in marks]
    return b"".join(_MARK.pack(*pair) for pair in [*held, *[_NO_MARK] * (_MAX_MARKS - len(held))])


def _packed(address: Address) -> bytes:
    return (_MAPPED if address.version == 4 else b"") + address.packed


def _networks(policy: Policy, local: Iterable[Network]) -> Iterator[tuple[bytes, bytes]]:
    lists: tuple[tuple[int, Iterable[Network]], ...] = (
        (_EXCLUDED_DESTINATIONS, policy.outbound.exclude_destinations),
        (_EXCLUDED_SOURCES, policy.inbound.exclude_sources),
        (_LOCAL_NETWORKS, local),
    )
    for number, networks in lists:
        for network in networks:
            # The families' lists are apart: ::/0 must not hold every mapped IPv4 address.
            ipv6 = int(network.version == 6)
            length = _LIST_BITS + network.prefixlen + (0 if ipv6 else 8 * len(_MAPPED))
            yield struct.pack("=II", length, number + ipv6) + _packed(network.network_address), _INDEX.pack(1)


def _users(exclusions: Iterable[UidExclusion]) -> tuple[Entries, tuple[int, ...]]:
    """The map of users, and the port lists it refers to (the first of them is number 2).

    The ranges of different exclusions may overlap, and a lookup finds one entry; so the users are cut into pieces in
    which the same exclusions hold, and each piece into the prefixes that make it up.
    """
    items = tuple(exclusions)
    lists: dict[int, int] = {}
    entries: dict[bytes, bytes] = {}
    starts = sorted({item.uids.first for item in items} | {item.uids.last + 1 for item in items})
    for first, following in itertools.pairwise(starts):
        mine = [item for item in items if first in item.uids]
        bits = 0
        for item in mine:
            if item.protocol is Protocol.TCP:
                bits |= _bits(item.ports)
        dns = any(item.protocol is Protocol.UDP and includes(item.ports, DNS_PORT) for item in mine)
        if not bits and not dns:
            continue
        number = lists.setdefault(bits, len(lists) + _OUTBOUND_LIST + 1) if bits else 0
        for prefix in summarize_address_range(IPv4Address(first), IPv4Address(following - 1)):
            key = struct.pack("=I", prefix.prefixlen) + prefix.network_address.packed
            entries[key] = struct.pack("=II", number, dns)
    return entries, tuple(lists)


def describe(name: str, key: bytes, value: bytes) -> str:
    """One entry of a policy map, in words; for --dry-run and for showing drift."""
    if name == "settings":
        settings, netns = Settings.unpack(value)
        settings = replace(settings, flags=frozenset(settings.flags))
        return (
            f"netns {netns} proxy_uid {settings.proxy_uid} ports {settings.inbound_port} {settings.outbound_port} "
            f"{settings.dns_port} tpctl {settings.version} flags {' '.join(sorted(settings.flags))}"
        )
    if name == "ports":
        (number,) = _INDEX.unpack(key)
        return f"list {number}: {_ranges(int.from_bytes(value, 'little'))}"
    if name == "networks":
        length, number = struct.unpack_from("=II", key)
        return f"{_LISTS[number]} {_shown(key[8:])}/{length - _LIST_BITS - (0 if number % 2 else 96)}"
    if name == "users":
        ports, dns = struct.unpack("=II", value)
        (length,) = _INDEX.unpack_from(key)
        return f"uids {int.from_bytes(key[4:], 'big')}/{length} tcp list {ports or 'none'} dns {'yes' if dns else 'no'}"
    if name == "marks":
        found = [Mark(*pair) for pair in _MARK.iter_unpack(value) if pair != _NO_MARK]
        return f"excluded: {', '.join(map(str, found)) or 'none'}"
    return _shown(key)


_LISTS = ("to", "to", "from", "from", "local", "local")


def _shown(packed: bytes) -> str:
    from ipaddress import ip_address

    return str(ip_address(packed.removeprefix(_MAPPED) if packed.startswith(_MAPPED) else packed))


def _ranges(bits: int) -> str:
    found: list[str] = []
    port = 0
    while bits >> port:
        port += ((bits >> port) & -(bits >> port)).bit_length() - 1
        run = (~(bits >> port) & ((bits >> port) + 1)).bit_length() - 1
        found.append(str(port) if run == 1 else f"{port}-{port + run - 1}")
        port += run
    return ",".join(found) or "none"
