"""Disjoint intervals for nf_tables sets: the kernel refuses overlapping elements in one set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from tpctl.spec.policy import ALL_PORTS, Family, Network, PortRange, Ports, Protocol, UidExclusion, UidRange, of_family


def merged_ports(ports: Iterable[PortRange]) -> Ports:
    """The same ports as the fewest ranges, in order."""
    return tuple(PortRange(first, last) for first, last in _merged((port.first, port.last) for port in ports))


def merged_uids(uids: Iterable[UidRange]) -> tuple[UidRange, ...]:
    """The same users as the fewest ranges, in order."""
    return tuple(UidRange(first, last) for first, last in _merged((item.first, item.last) for item in uids))


def merged_networks(networks: Iterable[Network], family: Family) -> tuple[Network, ...]:
    """The networks of a family without those that lie in others, in order."""
    mine = of_family(networks, family)
    if family is Family.IPV4:
        return tuple(collapse_addresses(network for network in mine if isinstance(network, IPv4Network)))
    return tuple(collapse_addresses(network for network in mine if isinstance(network, IPv6Network)))


_MOST_PAIRS = 4
"""How many pairs may stand for a user or a range of ports, until a rule with two sets is the shorter way."""
_DEEPEST = 16
"""How many exclusions a uid is in, on the average, until users are not told apart by everything excluded for them."""


def uids_and_ports(
    exclusions: Iterable[UidExclusion], protocol: Protocol
) -> tuple[dict[Ports, tuple[UidRange, ...]], tuple[tuple[UidRange, PortRange], ...]]:
    """Which users' ports are excluded, in two parts: by the ports that users share, and as pairs of user and ports.

    Thousands of users with ports of their own are one set of pairs that way, and not a rule and two sets each: the
    kernel looks for a set among all of a table, so thousands of them take it minutes. The users of pairs are single:
    before nft 1.0.6 a range of uids in a concatenation is compared byte by byte in the wrong order.
    """
    wanted = [item for item in exclusions if item.protocol is protocol]
    if _is_tangled(wanted):
        return _by_given_ports(wanted), ()
    grouped = ports_by_uids(wanted, protocol)
    alone = {ports: tuple(_single(uids)) for ports, uids in grouped.items() if _is_small(ports, uids)}
    if len(alone) < 2:
        return grouped, ()
    shared = {ports: uids for ports, uids in grouped.items() if ports not in alone}
    return shared, tuple((uid, port) for ports, uids in alone.items() for uid in uids for port in ports)


def _is_tangled(exclusions: list[UidExclusion]) -> bool:
    """Whether ranges of users lie in each other so deep that what is excluded for each piece is far more than given."""
    ends = sorted(end for item in exclusions for end in ((item.uids.first, 1), (item.uids.last + 1, -1)))
    total = sum(itertools.accumulate(step for _, step in ends))
    return total > _DEEPEST * len(ends)


def _by_given_ports(exclusions: list[UidExclusion]) -> dict[Ports, tuple[UidRange, ...]]:
    """Users by the ports of each exclusion. A user may be in several; rules that pass need not be disjoint."""
    grouped: dict[Ports, list[UidRange]] = {}
    for item in exclusions:
        grouped.setdefault(merged_ports(item.ports), []).append(item.uids)
    return {ports: merged_uids(uids) for ports, uids in grouped.items()}


def _is_small(ports: Ports, uids: tuple[UidRange, ...]) -> bool:
    """Whether pairs do not take much more room than the users and the ports."""
    if ports == (ALL_PORTS,):
        return False
    return sum(one.last - one.first + 1 for one in uids) * len(ports) <= _MOST_PAIRS * (len(uids) + len(ports))


def _single(uids: Iterable[UidRange]) -> Iterator[UidRange]:
    return (UidRange(uid) for one in uids for uid in range(one.first, one.last + 1))


def ports_by_uids(exclusions: Iterable[UidExclusion], protocol: Protocol) -> dict[Ports, tuple[UidRange, ...]]:
    """Which users' ports are excluded: disjoint uid ranges, grouped by the ports all of a group's users share.

    One lookup of the uid then finds everything that is excluded for it, however many exclusions name it.
    """
    grouped: dict[Ports, list[UidRange]] = {}
    for uids, ports in _segments([item for item in exclusions if item.protocol is protocol]):
        grouped.setdefault(ports, []).append(uids)
    return {ports: merged_uids(uids) for ports, uids in grouped.items()}


def _segments(exclusions: list[UidExclusion]) -> Iterator[tuple[UidRange, Ports]]:
    """The uid space cut wherever an exclusion begins or ends; each piece with everything excluded for it."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for index, item in enumerate(exclusions):
        begins.setdefault(item.uids.first, []).append(index)
        ends.setdefault(item.uids.last + 1, []).append(index)
    active: set[int] = set()
    known: dict[frozenset[int], Ports] = {}
    start = 0
    for cut in sorted({*begins, *ends}):
        if active:
            key = frozenset(active)
            if key not in known:
                known[key] = merged_ports(port for index in key for port in exclusions[index].ports)
            yield UidRange(start, cut - 1), known[key]
        active.difference_update(ends.get(cut, ()))
        active.update(begins.get(cut, ()))
        start = cut


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Overlapping and adjacent ranges made one."""
    current: tuple[int, int] | None = None
    for first, last in sorted(ranges):
        if current is None:
            current = (first, last)
        elif first <= current[1] + 1:
            current = (current[0], max(current[1], last))
        else:
            yield current
            current = (first, last)
    if current is not None:
        yield current
