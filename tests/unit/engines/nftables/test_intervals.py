"""Sets hold disjoint intervals that mean exactly what the policy says."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Network, ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from tpctl.engines.nftables.intervals import merged_networks, merged_ports, merged_uids, ports_by_uids, uids_and_ports
from tpctl.spec.policy import (
    ALL_PORTS,
    MAX_UID,
    Family,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    contains,
    includes,
)

PORTS = st.sampled_from([1, 2, 3, 4, 7, 8, 65534, 65535])
UIDS = st.sampled_from([0, 1, 2, 3, 1000, 1001, MAX_UID - 1, MAX_UID])
port_ranges = st.tuples(PORTS, PORTS).map(lambda ends: PortRange(min(ends), max(ends)))
uid_ranges = st.tuples(UIDS, UIDS).map(lambda ends: UidRange(min(ends), max(ends)))
exclusions = st.builds(
    UidExclusion, st.sampled_from(Protocol), st.lists(port_ranges, min_size=1, max_size=3).map(tuple), uid_ranges
)
networks = st.builds(
    lambda bits, length: IPv4Network((bits, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)


@given(st.lists(port_ranges))
def test_merged_ports_are_the_same_ports_and_stand_apart(ranges: list[PortRange]) -> None:
    merged = merged_ports(ranges)
    assert all(a.last + 1 < b.first for a, b in itertools.pairwise(merged))
    assert all(includes(merged, port) == includes(ranges, port) for port in [*range(1, 12), *range(65530, 65536)])


@given(st.lists(uid_ranges))
def test_merged_uids_are_the_same_uids_and_stand_apart(ranges: list[UidRange]) -> None:
    merged = merged_uids(ranges)
    assert all(a.last + 1 < b.first for a, b in itertools.pairwise(merged))
    for uid in [*range(6), *range(998, 1004), *range(MAX_UID - 3, MAX_UID + 1)]:
        assert any(uid in item for item in merged) == any(uid in item for item in ranges)


@given(st.lists(networks, max_size=8), st.integers(0, 2**32 - 1))
def test_merged_networks_do_not_overlap_and_contain_the_same(wanted: list[IPv4Network], bits: int) -> None:
    merged = merged_networks([*wanted, ip_network("2001:db8::/32")], Family.IPV4)
    assert not any(a.overlaps(b) for i, a in enumerate(merged) for b in merged[i + 1 :])
    for address in (ip_address(bits), *(end for item in wanted for end in (item[0], item[-1]))):
        assert contains(merged, address) == contains(wanted, address)


@given(st.lists(exclusions, max_size=6), UIDS, st.sampled_from(Protocol))
def test_one_lookup_of_a_uid_finds_all_its_excluded_ports(wanted: list[UidExclusion], uid: int, tcp: Protocol) -> None:
    grouped = ports_by_uids(wanted, tcp)
    found = [ports for ports, uids in grouped.items() if any(uid in item for item in uids)]
    assert len(found) <= 1
    for port in (1, 2, 3, 4, 5, 7, 8, 9, 65533, 65534, 65535):
        expected = any(x.protocol is tcp and includes(x.ports, port) and uid in x.uids for x in wanted)
        assert bool(found and includes(found[0], port)) == expected


def test_everything_excluded_is_known_as_such() -> None:
    halves = (PortRange(1, 100), PortRange(101, 65535))
    assert list(ports_by_uids([UidExclusion(Protocol.TCP, halves, UidRange(5))], Protocol.TCP)) == [(ALL_PORTS,)]


@given(st.lists(exclusions, max_size=6), UIDS, st.sampled_from(Protocol))
def test_users_by_ports_and_pairs_exclude_what_is_given(
    wanted: list[UidExclusion], uid: int, protocol: Protocol
) -> None:
    shared, pairs = uids_and_ports(wanted, protocol)
    for port in (1, 2, 3, 4, 5, 7, 8, 9, 65533, 65534, 65535):
        by_ports = any(includes(ports, port) and any(uid in one for one in uids) for ports, uids in shared.items())
        by_pair = sum(uid in user and port in ports for user, ports in pairs)
        expected = any(x.protocol is protocol and includes(x.ports, port) and uid in x.uids for x in wanted)
        assert by_pair <= 1, "nf_tables refuses elements that overlap"
        assert (by_ports or bool(by_pair)) == expected


def test_users_that_lie_in_each_other_thousands_deep_are_not_told_apart() -> None:
    nested = [UidExclusion(Protocol.TCP, (PortRange(1 + n),), UidRange(n, 100000)) for n in range(4000)]
    shared, pairs = uids_and_ports(nested, Protocol.TCP)
    assert not pairs
    assert sum(len(ports) + len(uids) for ports, uids in shared.items()) == 8000
