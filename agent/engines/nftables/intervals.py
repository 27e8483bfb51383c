"""Disjoint intervals for nf_tables sets: the kernel refuses overlapping elements in one set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from agent.policy import Family, Network, PortRange, Ports, Protocol, UidExclusion, UidRange, of_family


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
