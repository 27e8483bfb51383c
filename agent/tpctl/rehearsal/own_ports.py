"""Connections that are aimed at the data plane's own ports (g1), and those that only look like it. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from tpctl.rehearsal.cast import Cast, Probe, sample
from tpctl.rehearsal.choices import data_plane_ports
from tpctl.rehearsal.layout import HOST_LINK_LOCAL, PEER_LINK_LOCAL, member
from tpctl.spec.policy import DNS_PORT, MAX_PORT, RESERVED, Address, Family, Network, Protocol, of_family


def own_ports(cast: Cast) -> Iterator[Probe]:
    """From outside, from here, by the data plane's user, and to the same ports of others."""
    ports = sorted(data_plane_ports(cast.policy))
    for port in ports:
        yield from _at(cast, Protocol.TCP, port)
    yield from _at(cast, Protocol.UDP, cast.policy.dns.port)
    beside = {port + step for port in ports for step in (-1, 1)} - {*ports, DNS_PORT}
    for port in sorted(port for port in beside if 0 < port <= MAX_PORT):
        yield cast.arrive(f"inbound to port {port}, next to one of the data plane's", port)
        yield cast.out(f"application to its own host's port {port}", port, to=cast.own)
    for port in {cast.policy.dns.port - 1, cast.policy.dns.port + 1} - {DNS_PORT}:
        yield cast.arrive(f"inbound UDP to port {port}", port, protocol=Protocol.UDP)
        yield Probe(f"IPv{cast.family} UDP to {cast.own} port {port}", cast.leaves(Protocol.UDP, cast.own, port))
    if cast.family is Family.IPV6:
        label = "inbound to the data plane's port between link-local addresses"
        yield cast.arrive(label, cast.policy.outbound.port, source=PEER_LINK_LOCAL, to=HOST_LINK_LOCAL)


def _at(cast: Cast, protocol: Protocol, port: int) -> Iterator[Probe]:
    name = f"the data plane's {protocol.upper()} port {port}"
    yield cast.arrive(f"inbound to {name}", port, protocol=protocol)
    for source in _first(cast, cast.policy.inbound.exclude_sources):
        yield cast.arrive(f"inbound from an excluded source to {name}", port, source=source, protocol=protocol)
    local = RESERVED[cast.family].local.network_address
    for to in (cast.own, local):
        yield Probe(f"IPv{cast.family} application to {name} on {to}", cast.leaves(protocol, to, port))
        asked = cast.leaves(protocol, to, port, cast.policy.proxy_uid)
        yield Probe(f"IPv{cast.family} the data plane's user to {name} on {to}", asked)
    label = f"IPv{cast.family} application to {protocol.upper()} port {port} of another host"
    yield Probe(label, cast.leaves(protocol, cast.remote, port))
    for excluded in _first(cast, cast.policy.outbound.exclude_destinations):
        label = f"IPv{cast.family} application to {protocol.upper()} port {port} of an excluded destination"
        yield Probe(label, cast.leaves(protocol, excluded, port))
    if cast.policy.cgroup:
        outside = cast.policy.cgroup.path.rpartition("/")[0]
        asked = dataclasses.replace(cast.leaves(protocol, cast.own, port), cgroup=outside)
        yield Probe(f"IPv{cast.family} application outside the cgroup to {name}", asked)
        asked = dataclasses.replace(cast.leaves(protocol, cast.remote, port), cgroup=outside)
        label = f"IPv{cast.family} application outside the cgroup to {protocol.upper()} port {port} of another host"
        yield Probe(label, asked)
    for bridge in cast.layout.bridges:
        inside = bridge.network(cast.family)
        if inside is None:
            continue
        container = member(inside)
        for to, whose in (
            (cast.own, name),
            (inside[1], f"{name} on the bridge's address"),
            (cast.remote, f"port {port} of another host"),
        ):
            label = f"{bridge.name}: container to {whose} over {protocol.upper()}"
            yield cast.arrive(label, port, source=container, to=to, protocol=protocol)
        label = f"another host to {protocol.upper()} port {port} of {bridge.name}'s container"
        yield cast.arrive(label, port, to=container, protocol=protocol)


def _first(cast: Cast, networks: Iterable[Network]) -> Iterator[Address]:
    """An address in the first of them that is of the family, if the peer has that."""
    network = next(of_family(networks, cast.family), None)
    if network is not None and cast.layout.locate(sample(network)) == cast.layout.locate(cast.remote):
        yield sample(network)
