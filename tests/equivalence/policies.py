"""Strategies for policies: all fields, from small pools, so that random connections meet random rules often."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import TypeVar

from hypothesis import strategies as st

from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import (
    ALL_PORTS,
    MAX_UID,
    Address,
    Cgroup,
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
    Redirection,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

T = TypeVar("T")

PORTS = (1, 22, 53, 80, 443, 1023, 5000, 5001, 5005, 5010, 5011, 8080, 15001, 15006, 15053, 65535)
UIDS = (0, 1, 1000, 1001, 5678, 65534, 70000, 2**31 + 1, MAX_UID)
ADDRESSES: tuple[Address, ...] = (
    *map(ip_address, ("10.1.2.3", "10.1.2.4", "10.9.9.9", "10.0.0.53", "8.8.8.8", "203.0.113.7")),
    *map(ip_address, ("2001:db8:1::3", "2001:db8:9::9", "2001:db8::53", "2600::1")),
)
NETWORKS: tuple[Network, ...] = (
    *map(ip_network, ("10.0.0.0/8", "10.1.2.3/32", "10.9.0.0/16", "10.0.0.53/32", "127.0.0.0/8", "0.0.0.0/1")),
    *map(ip_network, ("198.19.255.0/24", "2001:db8::/32", "2001:db8:1::3/128", "2001:db8::53/128", "8000::/1")),
    *map(ip_network, ("fd74:7063:746c::/64", "172.30.0.0/16", "0.0.0.0/0")),
)
SERVERS = (
    *(NameServer(ip_address(text)) for text in ("10.0.0.53", "10.1.2.4", "127.0.0.53", "127.0.0.1", "198.19.255.2")),
    *(NameServer(ip_address(text)) for text in ("172.30.0.1", "2001:db8::53", "::1")),
    NameServer(ip_address("fe80::53"), "wan0"),
    NameServer(ip_address("fe80::54"), "eth0"),
)
SERVICE = Cgroup("app.slice/app.service", 1)
"""One of the rehearsal's own takes its place (`tpctl.rehearsal.layout.stage`)."""
MARKS = (Mark(0x80000, 0xFF0000), Mark(51820), Mark(1), Mark(0x40, 0x41))
"""None needs the bit that brings TPROXY's answers back (0x1000)."""
INTERFACES = tuple(Interfaces(pattern) for pattern in ("tun0", "wg+", "br0", "br1+", "docker0", "d+", "eth+", "wan0"))
VNETS: tuple[tuple[VirtualNetwork, ...], ...] = (
    (VirtualNetwork("br+", ip_network("172.30.0.0/16")),),
    (VirtualNetwork("br+", ip_network("fd01::/64")),),
    (VirtualNetwork("docker0", ip_network("10.44.0.0/24")), VirtualNetwork("docker0", ip_network("fd44::/64"))),
)


def subsets(pool: Sequence[T], most: int) -> st.SearchStrategy[tuple[T, ...]]:
    """Up to so many of a pool, in any order."""
    return st.lists(st.sampled_from(pool), unique=True, max_size=most).map(tuple)


def _port_range(ends: tuple[int, int]) -> PortRange:
    return PortRange(min(ends), max(ends))


def port_ranges(most: int) -> st.SearchStrategy[tuple[PortRange, ...]]:
    """Ports and ranges that overlap and touch."""
    ends = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS))
    one = st.one_of(st.sampled_from(PORTS).map(PortRange), ends.map(_port_range))
    return st.lists(one, unique=True, max_size=most).map(tuple)


def uid_ranges() -> st.SearchStrategy[UidRange]:
    """One user, or a range of users."""
    pair = st.tuples(st.sampled_from(UIDS), st.sampled_from(UIDS))
    return st.one_of(st.sampled_from(UIDS).map(UidRange), pair.map(lambda ends: UidRange(min(ends), max(ends))))


usually_on = st.sampled_from([True, True, True, False])
usually_off = usually_on.map(lambda value: not value)
# More than 15 entries do not fit one multiport match.
few_ports = st.one_of(st.just(()), port_ranges(4), port_ranges(20))
seldom_ports = st.one_of(st.just(()), st.just(()), few_ports)

inbounds = st.builds(
    Inbound,
    enabled=usually_on,
    port=st.sampled_from([15006, 15006, 16006]),
    include_ports=seldom_ports,
    exclude_ports=few_ports,
    exclude_sources=subsets(NETWORKS, 2),
    insert=st.booleans(),
    mode=st.sampled_from(Redirection),
)
uid_exclusions = st.builds(
    UidExclusion,
    protocol=st.sampled_from(Protocol),
    ports=st.one_of(st.just((ALL_PORTS,)), port_ranges(18).filter(bool)),
    uids=uid_ranges(),
)
outbounds = st.builds(
    Outbound,
    enabled=usually_on,
    port=st.sampled_from([15001, 15001, 10001]),
    include_ports=seldom_ports,
    exclude_ports=few_ports,
    exclude_destinations=subsets(NETWORKS, 2),
    exclude_uids=st.lists(uid_exclusions, max_size=3).map(tuple),
    exclude_marks=st.one_of(st.just(()), subsets(MARKS, 3)),
    insert=st.booleans(),
)
dnses = st.builds(
    Dns,
    capture=st.sampled_from(DnsCapture),
    port=st.sampled_from([15053, 15053, 5353]),
    servers=subsets(SERVERS, 3),
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
    exclude_interfaces=st.one_of(st.just(()), subsets(INTERFACES, 2)),
    drop_invalid=usually_off,
    guard_ports=usually_on,
    log_level=st.sampled_from([None, None, 7]),
    cgroup=st.sampled_from([None, None, None, SERVICE]),
)
"""Every field but `loopback`, as a rehearsal always takes place on `lo`, and `when_proxy_down`, which most engines
refuse."""
