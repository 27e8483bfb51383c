"""Shares of a limited room, for every order of taking and giving."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.relay.loop import descriptors
from tpctl.relay.loop.shares import Shares

KINDS = 3
STEPS = st.lists(st.tuples(st.integers(0, KINDS - 1), st.integers(1, 3), st.booleans()), max_size=60)


@given(st.lists(st.integers(0, 5), min_size=KINDS, max_size=KINDS), st.integers(0, 10), STEPS)
def test_whoever_takes_what_each_kind_still_gets_what_is_kept_for_it(
    kept: list[int], common: int, steps: list[tuple[int, int, bool]]
) -> None:
    total = sum(kept) + common
    shares, used = Shares(total, kept), [0] * KINDS
    for kind, places, takes in steps:
        if takes:
            had_room = shares.has_room(kind, places)
            assert shares.take(kind, places) == had_room
            used[kind] += places if had_room else 0
        elif used[kind] >= places:
            shares.give(kind, places)
            used[kind] -= places
        assert sum(used) <= total
        for one in range(KINDS):
            assert shares.has_room(one, max(0, kept[one] - used[one]))
    for kind in range(KINDS):
        shares.give(kind, used[kind])
    assert all(shares.take(kind, kept[kind]) for kind in range(KINDS))
    assert shares.take(0, common)


@pytest.mark.parametrize("limit", [0, 14, 18, 20, 24, 42, 56, 112, 1024, 20_000, 524_288, 2**30])
def test_descriptors_are_divided_whatever_the_limit_is(limit: int) -> None:
    shares = descriptors.shares_of(limit, 12)
    assert 0 <= shares.total <= max(0, limit - 12)
    if shares.total >= 6:
        # All that one direction can take leaves the other ones a connection.
        while shares.take(descriptors.INBOUND, descriptors.A_CONNECTION) and limit < 10_000:
            pass
        assert shares.has_room(descriptors.OUTBOUND, descriptors.A_CONNECTION)
    if shares.total >= 12:
        assert shares.has_room(descriptors.DNS, 3)
