"""The iptables engine agrees with `decide()`: random policies, random connections, real sockets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from agent import loopback
from agent.decide import Connection, decide
from agent.engine_options import EngineOptions
from agent.engines.registry import select
from agent.policy import (
    ALL_PORTS,
    MAX_UID,
    Address,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Network,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)
from agent.rehearsal.lab import Lab
from agent.rehearsal.layout import HOST, HOST_ADDRESS, LOOPBACK, Layout, Staging, gateway, member, stage
from agent.rehearsal.probes import Probe, probes
from agent.rehearsal.rehearse import attempt

pytestmark = pytest.mark.root

POLICIES_PER_VARIANT = int(os.environ.get("TPCTL_POLICIES", "40"))
"""Set TPCTL_POLICIES to look further; more than the default are drawn anew each time."""
CONNECTIONS_PER_POLICY = 30
T = TypeVar("T")

# Small pools, so that random connections meet random rules often.
PORTS = (1, 22, 53, 80, 443, 1023, 5000, 5001, 5005, 5010, 5011, 8080, 15001, 15006, 15053, 65535)
UIDS = (0, 1, 1000, 1001, 5678, 65534, 70000, 2**31 + 1, MAX_UID)
ADDRESSES: tuple[Address, ...] = (
    *map(ip_address, ("10.1.2.3", "10.1.2.4", "10.9.9.9", "10.0.0.53", "8.8.8.8", "203.0.113.7")),
    *map(ip_address, ("2001:db8:1::3", "2001:db8:9::9", "2001:db8::53", "2600::1")),
)
NETWORKS: tuple[Network, ...] = (
    *map(ip_network, ("10.0.0.0/8", "10.1.2.3/32", "10.9.0.0/16", "10.0.0.53/32", "127.0.0.0/8", "0.0.0.0/1")),
    *map(ip_network, ("198.19.255.0/24", "2001:db8::/32", "2001:db8:1::3/128", "2001:db8::53/128", "8000::/1")),
    ip_network("fd74:7063:746c::/64"),
)
SERVERS = ("10.0.0.53", "10.1.2.4", "127.0.0.53", "127.0.0.1", "198.19.255.2", "172.30.0.1", "2001:db8::53", "::1")
VNETS: tuple[tuple[VirtualNetwork, ...], ...] = (
    (VirtualNetwork("br+", ip_network("172.30.0.0/16")),),
    (VirtualNetwork("br+", ip_network("fd01::/64")),),
    (
        VirtualNetwork("docker0", ip_network("10.44.0.0/24")),
        VirtualNetwork("docker0", ip_network("fd44::/64")),
    ),
)


def subsets(pool: Sequence[T], most: int) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(st.sampled_from(pool), unique=True, max_size=most).map(tuple)


def ranges(most: int) -> st.SearchStrategy[tuple[PortRange, ...]]:
    def ordered(ends: tuple[int, int]) -> PortRange:
        return PortRange(min(ends), max(ends))

    one = st.one_of(
        st.sampled_from(PORTS).map(PortRange),
        st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(ordered),
    )
    return st.lists(one, unique=True, max_size=most).map(tuple)


def uid_ranges() -> st.SearchStrategy[UidRange]:
    pair = st.tuples(st.sampled_from(UIDS), st.sampled_from(UIDS))
    return pair.map(lambda ends: UidRange(min(ends), max(ends)))


usually_on = st.sampled_from([True, True, True, False])
usually_off = usually_on.map(lambda value: not value)
few_ports = st.one_of(st.just(()), ranges(4), ranges(20))
inbounds = st.builds(
    Inbound,
    enabled=usually_on,
    include_ports=st.one_of(st.just(()), st.just(()), few_ports),
    exclude_ports=few_ports,
    exclude_sources=subsets(NETWORKS, 2),
    insert=st.booleans(),
)
exclusions = st.builds(
    UidExclusion,
    protocol=st.sampled_from(Protocol),
    ports=st.one_of(st.just((ALL_PORTS,)), ranges(18).filter(bool)),
    uids=uid_ranges(),
)
outbounds = st.builds(
    Outbound,
    enabled=usually_on,
    include_ports=st.one_of(st.just(()), st.just(()), few_ports),
    exclude_ports=few_ports,
    exclude_destinations=subsets(NETWORKS, 2),
    exclude_uids=st.lists(exclusions, max_size=2).map(tuple),
    insert=st.booleans(),
)
dnses = st.builds(
    Dns,
    capture=st.sampled_from(DnsCapture),
    servers=subsets(SERVERS, 3).map(lambda names: tuple(NameServer(ip_address(name)) for name in names)),
    tcp=st.booleans(),
    split_zones=usually_on,
)
policies = st.builds(
    Policy,
    proxy_uid=st.sampled_from(UIDS),
    families=st.sampled_from([frozenset(Family), frozenset(Family), frozenset({Family.IPV4})]),
    inbound=inbounds,
    outbound=outbounds,
    dns=dnses,
    virtual_networks=subsets(VNETS, 2).map(lambda groups: tuple(vnet for group in groups for vnet in group)),
    drop_invalid=usually_off,
    log_level=st.sampled_from([None, None, 7]),
)


@st.composite
def connections(draw: st.DrawFn, layout: Layout) -> Connection:
    """A connection of the host, the peer or a container, to somebody else."""
    port = draw(st.sampled_from(PORTS))
    protocol = draw(st.sampled_from(Protocol))
    family = draw(st.sampled_from(Family))
    members = [member(network) for bridge in layout.bridges for network in bridge.networks]
    gateways = [gateway(network) for bridge in layout.bridges for network in bridge.networks]
    if draw(st.booleans()):
        own = [HOST_ADDRESS[family], ip_address("127.0.0.1"), ip_address("127.0.0.2"), ip_address("::1")]
        destination = draw(st.sampled_from(_of(family, [*ADDRESSES, *own, *members, *gateways])))
        connection = layout.outgoing(protocol, destination, port, draw(st.sampled_from(UIDS)))
        passthrough = ip_address("127.0.0.6")
        if connection.interface == LOOPBACK and family is Family.IPV4 and draw(st.booleans()):
            connection = dataclasses.replace(connection, source=passthrough)
        return connection
    source = draw(st.sampled_from(_of(family, [*ADDRESSES, *members])))
    targets = _of(family, [HOST_ADDRESS[family], *members, *gateways, *(ADDRESSES if source in members else ())])
    origin = layout.locate(source)
    destination = draw(st.sampled_from([target for target in targets if layout.locate(target) != origin]))
    return layout.arriving(source, destination, protocol, port)


def _of(family: Family, addresses: Sequence[Address]) -> list[Address]:
    return [address for address in addresses if Family.of(address) is family]


def wrong_answers(staging: Staging, variant: str, more: Sequence[Connection]) -> list[str]:
    """The connections that ended elsewhere than decide() says."""
    policy, layout = staging.policy, staging.layout
    random = [Probe("a random connection", connection) for connection in more]
    with Lab(layout) as lab:
        with lab.inside(HOST):
            engine = select(EngineOptions(engine="iptables", iptables_mode=variant)).engine
            if Family.IPV6 in policy.families:
                loopback.add(policy.loopback)
            engine.apply(engine.plan(policy))
        lab.serve_data_plane(policy)
        return [
            f"{result.probe.label}: {result.probe.connection}\n  expected {result.expected}, because "
            f"{result.verdict.reason} ({result.verdict.rule}, zone {result.verdict.zone})\n  got {result.answer}"
            for result in attempt(lab, policy, [*probes(policy, layout), *random])
            if not result.ok
        ]


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_engine_agrees_with_the_specification(variant: str) -> None:
    @settings(
        max_examples=POLICIES_PER_VARIANT,
        deadline=None,
        derandomize="TPCTL_POLICIES" not in os.environ,
        database=None,
        print_blob=False,
        phases=[Phase.generate],  # shrinking takes minutes of namespaces; the policy is printed as drawn
        suppress_health_check=list(HealthCheck),
    )
    @given(policy=policies, data=st.data())
    def agree(policy: Policy, data: st.DataObject) -> None:
        staging = stage(policy)
        drawn = data.draw(st.lists(connections(staging.layout), max_size=CONNECTIONS_PER_POLICY))
        for connection in drawn:
            assert decide(staging.policy, connection).steps
        wrong = wrong_answers(staging, variant, drawn)
        note(f"policy: {policy}")
        assert not wrong, "\n".join(wrong)

    agree()
