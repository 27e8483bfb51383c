"""What the scratch topology of a rehearsal looks like: a value, computed from the policy that is to be rehearsed.

    peer ──(uplinks)── host ──(bridges)── one container each

`peer` answers for every remote address a policy may name and so plays clients, servers and name servers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from tpctl.spec.connection import Connection, Direction
from tpctl.spec.exclusions import Interfaces
from tpctl.spec.policy import Address, Cgroup, Family, Network, Policy, Protocol, VirtualNetwork

HOST = "host"
PEER = "peer"
LOOPBACK = "lo"

HOST_ADDRESS: dict[Family, Address] = {
    Family.IPV4: IPv4Address("198.19.255.2"),
    Family.IPV6: IPv6Address("fd74:7063:746c::2"),
}
PEER_ADDRESS: dict[Family, Address] = {
    Family.IPV4: IPv4Address("198.19.255.1"),
    Family.IPV6: IPv6Address("fd74:7063:746c::1"),
}
"""From the benchmarking range (RFC 2544) and a private range: unlikely to be named by a real policy."""
HOST_LINK_LOCAL = IPv6Address("fe80::7063:2")
PEER_LINK_LOCAL = IPv6Address("fe80::7063:1")
"""On every uplink."""
_UPLINKS = ("eth0", "uplink0", "wan0", "net0")
"""Names for the one uplink: one that no rule is about."""
_MOST_EXCLUDED = 4
"""Of a policy with more excluded interfaces, the first are tried."""
_INTERFACE_NAME_MAX = 15


@dataclass(frozen=True, slots=True)
class Uplink:
    """A link from the host to the peer. `servers` are link-local addresses that the peer has on it."""

    name: str
    servers: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Bridge:
    """The host's interface to a container, standing for a virtual network or an excluded interface."""

    name: str
    networks: tuple[Network, ...]

    def network(self, family: Family) -> Network | None:
        """The network of a family on it."""
        return next((network for network in self.networks if Family.of(network) is family), None)


CONTAINER_LINK = "eth0"
"""The container's end of a bridge."""


def far_end(number: int) -> str:
    """The peer's end of an uplink."""
    return f"up{number}"


def gateway(network: Network) -> Address:
    """The host's address in a virtual network."""
    return network[1]


def member(network: Network) -> Address:
    """The container's address in a virtual network."""
    return network[2]


@dataclass(frozen=True, slots=True)
class Layout:
    """The topology. The first uplink carries the addresses and the default routes."""

    uplinks: tuple[Uplink, ...] = (Uplink("eth0"),)
    bridges: tuple[Bridge, ...] = ()
    families: frozenset[Family] = frozenset(Family)

    def bridge_of(self, address: Address) -> tuple[Bridge, Network] | None:
        """The bridge behind which an address lies, by longest prefix."""
        matches = [(n, b) for b in self.bridges for n in b.networks if n.version == address.version and address in n]
        if not matches:
            return None
        network, bridge = max(matches, key=lambda match: match[0].prefixlen)
        return bridge, network

    def is_local(self, address: Address) -> bool:
        """Whether an address is the host's own (`::6` counts: an installed policy has it on the loopback interface)."""
        family = Family.of(address)
        if address.is_loopback or address in (HOST_ADDRESS[family], HOST_LINK_LOCAL, IPv6Address("::6")):
            return True
        return any(address == gateway(network) for bridge in self.bridges for network in bridge.networks)

    def locate(self, address: Address) -> str:
        """The node that has, or answers for, an address: `host`, `peer` or a bridge's name."""
        if self.is_local(address):
            return HOST
        behind = self.bridge_of(address)
        return behind[0].name if behind else PEER

    def outgoing(self, protocol: str, destination: Address, port: int, uid: int) -> Connection:
        """A connection that a process of the host opens, with the interface and source the kernel would choose."""
        family = Family.of(destination)
        source, interface = HOST_ADDRESS[family], self.uplinks[0].name
        behind = self.bridge_of(destination)
        if self.is_local(destination):
            source, interface = (ip_address("127.0.0.1"), LOOPBACK) if family is Family.IPV4 else (destination, "lo")
            if family is Family.IPV4 and not destination.is_loopback:
                source = destination
        elif behind:
            source, interface = gateway(behind[1]), behind[0].name
        elif destination.is_link_local and family is Family.IPV6:
            source = HOST_LINK_LOCAL
        return Connection(Direction.OUTBOUND, protocol, source, destination, port, interface, uid=uid)

    def arriving(self, source: Address, destination: Address, protocol: str, port: int) -> Connection:
        """A connection that the peer or a container opens; which of the two, `source` tells."""
        behind = self.bridge_of(source)
        interface = behind[0].name if behind else self.uplinks[0].name
        local = self.is_local(destination)
        return Connection(Direction.INBOUND, protocol, source, destination, port, interface, local_destination=local)

    def link_of_origin(self, connection: Connection) -> str:
        """The interface by which a connection leaves the node that opens it."""
        if connection.direction is Direction.OUTBOUND:
            return connection.interface
        numbers = (number for number, uplink in enumerate(self.uplinks) if uplink.name == connection.interface)
        return next((far_end(number) for number in numbers), CONTAINER_LINK)

    def origin(self, connection: Connection) -> str:
        """The node that opens a connection."""
        return HOST if connection.direction is Direction.OUTBOUND else self.locate(connection.source)


@dataclass(frozen=True, slots=True)
class Staging:
    """A policy made fit for the scratch topology, the topology, and what could not be carried over, in words."""

    policy: Policy
    layout: Layout
    notes: tuple[str, ...]


def stage(policy: Policy, families: frozenset[Family] = frozenset(Family), cgroup: Cgroup | None = None) -> Staging:
    """Lay out a topology on which `policy` can be rehearsed, on a kernel with `families`.

    `cgroup` stands for the control group of the policy, if it has one.
    """
    notes: list[str] = []
    keep = tuple(vnet for vnet in policy.virtual_networks if _fits(vnet, notes))
    bridges = _bridges(keep)
    bridges += tuple(_excluded(policy.exclude_interfaces, bridges, notes))
    uplinks = _uplinks(policy, {bridge.name for bridge in bridges}, notes)
    fit = dataclasses.replace(
        policy,
        loopback=LOOPBACK,
        virtual_networks=keep,
        families=policy.families & families,
        cgroup=policy.cgroup and (cgroup or policy.cgroup),
    )
    for family in sorted(policy.families - families):
        notes.append(f"this kernel has no IPv{family}: not rehearsed")
    return Staging(fit, Layout(uplinks, bridges, families), tuple(notes))


def _fits(vnet: VirtualNetwork, notes: list[str]) -> bool:
    family = Family.of(vnet.network)
    if vnet.network.num_addresses < 4:
        notes.append(f"virtual network {vnet}: too small for a host and a container, not rehearsed")
        return False
    if HOST_ADDRESS[family] in vnet.network or vnet.network.is_loopback or gateway(vnet.network).is_unspecified:
        notes.append(f"virtual network {vnet}: overlaps the scratch topology, not rehearsed")
        return False
    return True


def _bridges(vnets: tuple[VirtualNetwork, ...]) -> tuple[Bridge, ...]:
    by_pattern: dict[str, list[Network]] = {}
    for vnet in vnets:
        by_pattern.setdefault(vnet.interface, []).append(vnet.network)
    taken = set(by_pattern)
    bridges = []
    for pattern, networks in sorted(by_pattern.items()):
        name = _concrete(pattern, taken)
        taken.add(name)
        bridges.append(Bridge(name, tuple(networks)))
    return tuple(bridges)


def _excluded(excluded: tuple[Interfaces, ...], bridges: tuple[Bridge, ...], notes: list[str]) -> Iterator[Bridge]:
    """An interface for each exclusion that no bridge is an example of, with somebody behind it."""
    taken = {bridge.name for bridge in bridges}
    occupied = [network for bridge in bridges for network in bridge.networks]
    wanting = [each for each in excluded if not any(name in each for name in taken)]
    for number, each in enumerate(wanting):
        networks = (ip_network(f"198.19.{number}.0/28"), ip_network(f"fd74:7063:746d:{number:x}::/64"))
        overlaps = any(one.version == other.version and one.overlaps(other) for one in networks for other in occupied)
        if number >= _MOST_EXCLUDED or overlaps:
            notes.append(f"excluded interface {each}: not rehearsed")
            continue
        name = _concrete(each.pattern, taken)
        taken.add(name)
        yield Bridge(name, networks)


def _concrete(pattern: str, taken: set[str]) -> str:
    """An interface name that matches a pattern such as `br+`."""
    if not pattern.endswith("+"):
        return pattern
    stem = pattern[:-1][: _INTERFACE_NAME_MAX - 1] or "net"
    return next(name for name in (f"{stem}{number}" for number in range(100)) if name not in taken)


def _uplinks(policy: Policy, taken: set[str], notes: list[str]) -> tuple[Uplink, ...]:
    scoped: dict[str, list[Address]] = {}
    for server in policy.dns.servers:
        if server.interface is None:
            continue
        if server.interface in taken | {LOOPBACK, policy.loopback} or not server.address.is_link_local:
            notes.append(f"name server {server}: its interface cannot be rehearsed")
            continue
        scoped.setdefault(server.interface, []).append(server.address)
    if not scoped:
        special = [Interfaces(vnet.interface) for vnet in policy.virtual_networks] + list(policy.exclude_interfaces)
        ordinary = (name for name in _UPLINKS if name not in taken and not any(name in each for each in special))
        return (Uplink(next(ordinary, "eth0" if "eth0" not in taken else "uplink0")),)
    return tuple(Uplink(name, tuple(addresses)) for name, addresses in scoped.items())


def seat(layout: Layout, connection: Connection) -> tuple[str, int]:
    """The node and port where a connection ends when nobody redirects it. Only for TCP and UDP."""
    assert connection.destination_port is not None
    assert connection.protocol in (Protocol.TCP, Protocol.UDP)
    return layout.locate(connection.destination), connection.destination_port
