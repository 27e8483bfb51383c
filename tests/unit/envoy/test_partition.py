"""Sets of networks: exact, disjoint, and of the same opinion as the relay about whom access rules admit."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from tpctl.relay.loop.networks import NetworkSet
from tpctl.relay.settings.access import Access
from tpctl.relay.settings.partition import EVERYWHERE, admitted, minus, shared
from tpctl.spec.policy import Network

NETWORKS = st.lists(
    st.one_of(
        st.builds(lambda bits, length: ip_network((bits & 0xFF0F00FF, length), strict=False),
                  st.integers(0, 2**32 - 1), st.integers(0, 32)),
        st.builds(lambda bits, length: ip_network((bits, length), strict=False),
                  st.integers(0, 2**128 - 1), st.integers(0, 128)),
    ),
    max_size=6,
)  # fmt: skip


def edges(*groups: tuple[Network, ...] | list[Network]) -> list[IPv4Address | IPv6Address]:
    """Addresses at which something may change."""
    found = [ip_address("0.0.0.0"), ip_address("255.255.255.255"), ip_address("::"), ip_address("ff::")]
    for one in (network for group in groups for network in group):
        for number in (int(one[0]) - 1, int(one[0]), int(one[-1]), int(one[-1]) + 1):
            if 0 <= number < 2**one.max_prefixlen:
                found.append(type(one[0])(number))
    return found


def has(networks: tuple[Network, ...] | list[Network], address: IPv4Address | IPv6Address) -> bool:
    return any(address.version == one.version and address in one for one in networks)


@given(NETWORKS, NETWORKS)
def test_minus_and_shared(some: list[Network], others: list[Network]) -> None:
    rest, both = minus(some, others), shared(some, others)
    for address in edges(some, others):
        assert has(rest, address) is (has(some, address) and not has(others, address))
        assert has(both, address) is (has(some, address) and has(others, address))
    for found in (rest, both):
        assert sum(one.num_addresses for one in found) == sum(one.num_addresses for one in set(found))
        assert not any(one.overlaps(other) for one in found for other in found
                       if one is not other and one.version == other.version)  # fmt: skip


@given(NETWORKS, NETWORKS, st.booleans())
def test_whom_access_admits_is_what_the_relay_says(allow: list[Network], deny: list[Network], default: bool) -> None:
    access = Access(NetworkSet(allow), NetworkSet(deny), default)
    found = admitted(access)
    for address in edges(allow, deny):
        assert has(found, address) is access.admits(str(address))


def test_everything_but_nothing() -> None:
    assert minus(EVERYWHERE, ()) == EVERYWHERE
    assert minus((), EVERYWHERE) == ()
