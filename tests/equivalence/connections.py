"""Connections over all dimensions that `decide()` knows, drawn for the topology of one policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from random import Random

from tests.equivalence.policies import ADDRESSES, PORTS, UIDS
from tpctl.rehearsal.cgroup import BELOW
from tpctl.rehearsal.choices import can_answer_clients, data_plane_ports, redirected_ports
from tpctl.rehearsal.layout import (
    HOST_ADDRESS,
    HOST_LINK_LOCAL,
    LOOPBACK,
    PEER_ADDRESS,
    PEER_LINK_LOCAL,
    Layout,
    gateway,
    member,
)
from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.policy import DNS_PORT, PASSTHROUGH6, Address, Family, Policy, Protocol

_OWN = tuple(map(ip_address, ("127.0.0.1", "127.0.0.2", "127.0.0.53", "::1")))
_PASSTHROUGH: dict[Family, Address] = {Family.IPV4: ip_address("127.0.0.6"), Family.IPV6: PASSTHROUGH6}
_APPLICATION = 1000
_MARKS = (0x80000, 0x8ABCD, 0x180000, 51820, 51821, 1, 3, 0x40, 0x41, 0x42, 2**32 - 1 & ~0x1000)


class Cast:
    """Who may talk to whom on a layout."""

    def __init__(self, policy: Policy, layout: Layout) -> None:
        self.layout = layout
        self.policy = policy
        links = {uplink.name for uplink in layout.uplinks}
        servers = [server.address for server in policy.dns.servers if not server.interface]
        networks = [network for bridge in layout.bridges for network in bridge.networks]
        self.members = [member(network) for network in networks]
        self.gateways = [gateway(network) for network in networks]
        self.remotes: list[Address] = [*ADDRESSES, *(s for s in servers if not layout.is_local(s))]
        self.own: list[Address] = [*HOST_ADDRESS.values(), *_OWN, *(s for s in servers if layout.is_local(s))]
        self.link_local: list[IPv6Address] = [PEER_LINK_LOCAL] if links else []
        self.own_ports = sorted(data_plane_ports(policy))
        self.groups: list[str | None] = []
        if policy.cgroup:
            inside = policy.cgroup.path
            self.groups = [inside, inside, f"{inside}/{BELOW}", inside.rpartition("/")[0], None]

    def connection(self, random: Random) -> Connection:
        """One connection of the host, the peer or a container, to somebody else."""
        family = random.choice(list(Family))
        protocol = random.choice(list(Protocol))
        port = random.choice((*PORTS, *self.own_ports, 53, 53, 53))
        return (
            self._leaves(random, family, protocol, port)
            if random.random() < 0.6
            else self._arrives(random, family, protocol, port)
        )

    def _leaves(self, random: Random, family: Family, protocol: Protocol, port: int) -> Connection:
        targets = random.choice([self.remotes, self.remotes, self.own, [*self.members, *self.gateways]])
        targets = _of(family, targets) or _of(family, self.remotes)
        if family is Family.IPV6 and random.random() < 0.1:
            targets = list(self.link_local)
        connection = self.layout.outgoing(protocol, random.choice(targets), port, random.choice(UIDS))
        if connection.interface == LOOPBACK and random.random() < 0.3:
            connection = dataclasses.replace(connection, source=_PASSTHROUGH[family])
        elif self._may_dial_for_a_client(connection) and random.random() < 0.5:
            source = random.choice(_of(family, self.remotes))
            connection = dataclasses.replace(connection, source=source, local_source=False)
        elif connection.interface != LOOPBACK and random.random() < 0.15:
            connection = dataclasses.replace(connection, device=connection.interface)
        if random.random() < 0.3:
            connection = dataclasses.replace(connection, mark=random.choice(_MARKS))
        return dataclasses.replace(connection, cgroup=random.choice(self.groups)) if self.groups else connection

    def _may_dial_for_a_client(self, connection: Connection) -> bool:
        """Whether the answer to a client's address would come back: nobody else's does, and no other mode's."""
        return (
            connection.interface == LOOPBACK
            and connection.protocol == Protocol.TCP
            and connection.uid == self.policy.proxy_uid
            and self.policy.inbound.is_transparent
            and can_answer_clients(connection.destination)
            and connection.family in self.policy.families
        )

    def _arrives(self, random: Random, family: Family, protocol: Protocol, port: int) -> Connection:
        source = random.choice(_of(family, [*self.remotes, *self.members]))
        if family is Family.IPV6 and random.random() < 0.1:
            return self.layout.arriving(PEER_LINK_LOCAL, HOST_LINK_LOCAL, protocol, port)
        origin = self.layout.locate(source)
        remotes = self.remotes if source in self.members else []
        targets = [HOST_ADDRESS[family], *_of(family, [*self.members, *self.gateways, *remotes])]
        if family is Family.IPV4 and random.random() < 0.15:
            targets = _of(family, _OWN)
        return self.layout.arriving(
            source, random.choice([each for each in targets if self.layout.locate(each) != origin]), protocol, port
        )

    def stateful(self, ports: tuple[int, int]) -> list[Connection]:
        """Segments that are no first packet: of a connection conntrack has not seen, and of none at all.

        `ports` are those to which connections arrive and leave.
        """
        arriving_port, leaving_port = ports
        found = []
        inside = self.groups[0] if self.groups else None
        for family in sorted(self.layout.families):
            remote, layout = PEER_ADDRESS[family], self.layout
            found += [
                layout.arriving(remote, HOST_ADDRESS[family], Protocol.TCP, arriving_port),
                dataclasses.replace(layout.outgoing(Protocol.TCP, remote, leaving_port, _APPLICATION), cgroup=inside),
                *(
                    layout.arriving(each, self._beyond(each, remote), Protocol.TCP, port)
                    for each in _of(family, self.members)
                    for port in (leaving_port, DNS_PORT)
                ),
            ]
        midstream = [dataclasses.replace(each, state=State.MIDSTREAM) for each in found]
        invalid = [dataclasses.replace(each, state=State.INVALID) for each in found]
        # A packet that cannot be placed is only made, and only dropped, where it arrives.
        return [*midstream, *(each for each in invalid if each.direction is Direction.INBOUND)]

    def _beyond(self, source: Address, remote: Address) -> Address:
        """Whom a container sends such a segment: by an excluded interface this host itself.

        What an invalid segment meets is told by the reset that comes for it, which is invalid too: coming from
        elsewhere it would be dropped on its way back.
        """
        behind = self.layout.bridge_of(source)
        return HOST_ADDRESS[Family.of(remote)] if behind and self.policy.excludes(behind[0].name) else remote


def random_connections(policy: Policy, layout: Layout, seed: int, count: int) -> list[Connection]:
    """So many connections; the same ones for the same seed."""
    cast, random = Cast(policy, layout), Random(seed)
    return [cast.connection(random) for _ in range(count)]


def stateful_connections(policy: Policy, layout: Layout) -> list[Connection]:
    """See `Cast.stateful`."""
    return Cast(policy, layout).stateful(redirected_ports(policy))


def _of(family: Family, addresses: Sequence[Address]) -> list[Address]:
    return [address for address in addresses if Family.of(address) is family]
