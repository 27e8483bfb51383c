"""Who and what takes part in a rehearsal, and how they connect. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from ipaddress import ip_address

from tpctl.rehearsal.choices import application_uid, redirected_ports
from tpctl.rehearsal.layout import HOST_ADDRESS, PEER, Layout
from tpctl.spec.connection import Connection
from tpctl.spec.policy import DNS_PORT, RESERVED, Address, Family, Network, Policy, Protocol, contains

_REMOTES: dict[Family, tuple[Address, ...]] = {
    Family.IPV4: tuple(map(ip_address, ("203.0.113.10", "198.51.100.10", "192.0.2.10", "9.9.9.10"))),
    Family.IPV6: tuple(map(ip_address, ("2001:db8:10::10", "2001:db8:ffff::10", "2600::10"))),
}


@dataclass(frozen=True, slots=True)
class Probe:
    """One connection to try, and what it stands for."""

    label: str
    connection: Connection


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what takes part, chosen so that no exclusion hits them by accident."""

    policy: Policy
    layout: Layout
    family: Family
    app: int
    remote: Address
    port_in: int
    port_out: int

    @property
    def own(self) -> Address:
        """The host's address."""
        return HOST_ADDRESS[self.family]

    @property
    def local(self) -> Address:
        """Where the host's applications dial themselves."""
        return RESERVED[self.family].local.network_address

    def leaves(self, protocol: Protocol, to: Address, port: int, uid: int | None = None) -> Connection:
        """A connection of the host; by the application unless told otherwise, and in the policy's control group."""
        connection = self.layout.outgoing(protocol, to, port, self.app if uid is None else uid)
        return dataclasses.replace(connection, cgroup=self.policy.cgroup.path) if self.policy.cgroup else connection

    def out(self, label: str, port: int, *, uid: int | None = None, to: Address | None = None) -> Probe:
        """A TCP connection of the host; by the application to the ordinary remote unless told otherwise."""
        return Probe(f"IPv{self.family} {label}", self.leaves(Protocol.TCP, to or self.remote, port, uid))

    def query(self, label: str, server: Address, protocol: Protocol = Protocol.UDP, *, uid: int | None = None) -> Probe:
        """A DNS query of the host."""
        return Probe(f"IPv{self.family} {label}", self.leaves(protocol, server, DNS_PORT, uid))

    def arrive(
        self, label: str, port: int, *, source: Address | None = None, to: Address | None = None,
        protocol: Protocol = Protocol.TCP,
    ) -> Probe:  # fmt: skip
        """A connection from elsewhere; to the host unless told otherwise."""
        connection = self.layout.arriving(source or self.remote, to or self.own, protocol, port)
        return Probe(f"IPv{self.family} {label}", connection)


def sample(network: Network) -> Address:
    """An address inside a network that is neither its first nor, usually, its last."""
    return network[min(9, network.num_addresses - 1)]


def cast_for(policy: Policy, layout: Layout, family: Family) -> Cast:
    """The cast for one family of a staged policy."""
    inbound, outbound = policy.inbound, policy.outbound
    avoided = (*inbound.exclude_sources, *outbound.exclude_destinations)
    servers = {server.address for server in policy.dns.servers}

    def ordinary(address: Address) -> bool:
        return not contains(avoided, address) and address not in servers and layout.locate(address) == PEER

    remotes = _REMOTES[family]
    return Cast(
        policy,
        layout,
        family,
        application_uid(policy),
        next(filter(ordinary, remotes), remotes[0]),
        *redirected_ports(policy),
    )
