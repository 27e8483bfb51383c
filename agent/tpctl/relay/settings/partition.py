"""Sets of addresses as networks: what is left of some without others, what two share, whom access rules admit. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range

from tpctl.relay.settings.access import Access
from tpctl.spec.policy import Network

EVERYWHERE: tuple[Network, ...] = (ip_network("0.0.0.0/0"), ip_network("::/0"))
_VERSIONS = (4, 6)
_Range = tuple[int, int]
"""The first and the last address."""


def minus(some: Iterable[Network], others: Iterable[Network]) -> tuple[Network, ...]:
    """The addresses of `some` that are in none of `others`, in as few networks as possible, IPv4 first."""
    some, others = tuple(some), tuple(others)
    return tuple(
        network
        for version in _VERSIONS
        for left in _subtract(_ranges(some, version), _ranges(others, version))
        for network in _networks(left, version)
    )


def shared(some: Iterable[Network], others: Iterable[Network]) -> tuple[Network, ...]:
    """The addresses that are in both."""
    some = tuple(some)
    return minus(some, minus(some, others))


def admitted(access: Access) -> tuple[Network, ...]:
    """All addresses that access rules admit."""
    return minus(EVERYWHERE if access.default_allow else access.allow.networks, access.deny.networks)


def _ranges(networks: Sequence[Network], version: int) -> list[_Range]:
    """In order, and joined where they touch."""
    found: list[_Range] = []
    for first, last in sorted(
        (int(one.network_address), int(one.broadcast_address)) for one in networks if one.version == version
    ):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _subtract(some: Sequence[_Range], others: Sequence[_Range]) -> Iterable[_Range]:
    index = 0
    for first, last in some:
        begin = first
        while index < len(others) and others[index][1] < begin:
            index += 1
        at = index
        while at < len(others) and others[at][0] <= last:
            if others[at][0] > begin:
                yield begin, others[at][0] - 1
            begin = max(begin, others[at][1] + 1)
            at += 1
        if begin <= last:
            yield begin, last


def _networks(addresses: _Range, version: int) -> Iterable[Network]:
    first, last = addresses
    if version == 4:
        return summarize_address_range(IPv4Address(first), IPv4Address(last))
    return summarize_address_range(IPv6Address(first), IPv6Address(last))
