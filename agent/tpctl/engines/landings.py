"""Where redirected connections land: what the data plane's sockets have to take. Pure.

Netfilter's REDIRECT sends what this host opens to 127.0.0.1 or ::1 (net/netfilter/nf_nat_redirect.c). What arrives
keeps its destination, and only what a container opens gets an address of the interface by which it came. TPROXY hands
it to a transparent socket only (net/netfilter/nft_tproxy.c). The eBPF programs give it to a socket that is bound to the
wildcard and to no interface (bpf/data_plane.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from tpctl.host.interfaces import HostAddress
from tpctl.spec.policy import (
    RESERVED,
    Address,
    DnsCapture,
    Family,
    Policy,
    Protocol,
    VirtualNetwork,
    WhenProxyDown,
    contains,
)

ANY: dict[Family, Address] = {Family.IPV4: IPv4Address(0), Family.IPV6: IPv6Address(0)}
"""Stands for every address of a family: only the wildcard takes them all."""


class Port(NamedTuple):
    """A port on which the data plane should listen."""

    role: str
    protocol: Protocol
    number: int

    def __str__(self) -> str:
        return f"{self.protocol} port {self.number} ({self.role})"


class Landing(NamedTuple):
    """What a socket on a port has to take."""

    port: Port
    address: Address
    interface: str | None
    """By which it arrives; None where it may be any."""
    whose: str
    """Who opens such connections, in words."""
    transparent: bool = False
    chosen_by_programs: bool = False
    """Whether eBPF programs give it to a socket that they know."""
    by_maker: bool = False
    """Whether rules know the answers by who made the socket: those of the conntrack zones do (z2)."""

    @property
    def family(self) -> Family:
        """Of the packets."""
        return Family.of(self.address)


def ports(policy: Policy) -> Iterator[Port]:
    """The ports a policy sends traffic to."""
    if policy.inbound.enabled:
        yield Port("inbound", Protocol.TCP, policy.inbound.port)
    if policy.outbound.enabled or policy.virtual_networks:
        yield Port("outbound", Protocol.TCP, policy.outbound.port)
    if policy.dns.capture is not DnsCapture.OFF or policy.virtual_networks:
        yield from _dns_ports(policy)


def _dns_ports(policy: Policy) -> Iterator[Port]:
    yield Port("dns", Protocol.UDP, policy.dns.port)
    if policy.dns.tcp:
        yield Port("dns", Protocol.TCP, policy.dns.port)


def landings(policy: Policy, engine: str, host: Iterable[HostAddress]) -> Iterator[Landing]:
    """What lands at the ports of a policy on a host with these addresses.

    A family in which the host can neither call nor be called needs no listener.
    """
    global_ones = tuple(one for one in host if _can_be_called(one.address))
    for family in sorted(policy.families):
        mine = tuple(one for one in global_ones if Family.of(one.address) is family)
        yield from _opened_here(policy, engine, family, is_connected=bool(mine))
        if policy.inbound.enabled and mine:
            yield from _arriving(policy, engine, mine)
        for vnet in policy.networks(family):
            yield from _of_network(policy, engine, vnet, mine)


def _can_be_called(address: Address) -> bool:
    """Whether others reach this host by an address, wherever they are."""
    passthrough = RESERVED[Family.of(address)].passthrough
    return not (address.is_loopback or address.is_link_local or contains((passthrough,), address))


def _opened_here(policy: Policy, engine: str, family: Family, *, is_connected: bool) -> Iterator[Landing]:
    here: Address = RESERVED[family].local.network_address
    if policy.outbound.enabled and is_connected:
        port = Port("outbound", Protocol.TCP, policy.outbound.port)
        yield Landing(port, here, policy.loopback, f"IPv{family} connections of this host")
    asks_itself = any(server.address.is_loopback for server in policy.servers(family))
    if policy.captures_dns(family) and (is_connected or asks_itself):
        for port in _dns_ports(policy):
            whose = f"IPv{family} DNS queries of this host"
            yield Landing(port, here, policy.loopback, whose, by_maker=_in_zones(policy, engine, port, family))


def _in_zones(policy: Policy, engine: str, port: Port, family: Family) -> bool:
    return engine != "ebpf" and port.protocol is Protocol.UDP and policy.splits_zones(family)


def _arriving(policy: Policy, engine: str, mine: Iterable[HostAddress]) -> Iterator[Landing]:
    port = Port("inbound", Protocol.TCP, policy.inbound.port)
    for one in mine:
        family = Family.of(one.address)
        whose = f"IPv{family} connections from other hosts"
        if engine == "ebpf":
            yield Landing(port, ANY[family], None, whose, chosen_by_programs=True)
            return
        # An address of the loopback interface is called by any other.
        interface = None if one.interface == policy.loopback else one.interface
        yield Landing(port, one.address, interface, whose, policy.inbound.is_transparent)


def _of_network(policy: Policy, engine: str, vnet: VirtualNetwork, mine: Iterable[HostAddress]) -> Iterator[Landing]:
    """REDIRECT gives a container's connection an address of the bridge; one that is not there yet may have any."""
    found = tuple(one for one in mine if vnet.carries(one.interface))
    for bridge in found or (HostAddress(vnet.interface, ANY[Family.of(vnet.network)]),):
        interface = bridge.interface if found else None
        outbound = Port("outbound", Protocol.TCP, policy.outbound.port)
        yield Landing(outbound, bridge.address, interface, f"connections of the virtual network {vnet}")
        for port in _dns_ports(policy):
            by_maker = _in_zones(policy, engine, port, Family.of(vnet.network))
            whose = f"DNS queries of the virtual network {vnet}"
            yield Landing(port, bridge.address, interface, whose, by_maker=by_maker)


def when_nobody_listens(policy: Policy) -> str:
    """What becomes of what would land."""
    if policy.when_proxy_down is WhenProxyDown.BYPASS:
        return "connections go past the data plane"
    return "redirected connections are refused"
