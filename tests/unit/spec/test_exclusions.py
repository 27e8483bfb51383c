"""Excluded marks and interfaces: rules m1 and e1."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.spec.asking import (
    APP,
    CAPTURED,
    OWN,
    PIN,
    POUT,
    PROXY,
    REMOTE,
    SERVER,
    UPSTREAM,
    VNETS,
    arrives,
    both_families,
    capture_all,
    goes_to,
    listed,
    out,
    passes,
    policy,
    query,
    verdict,
    zone,
)
from tpctl.spec.connection import State
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import Outbound
from tpctl.spec.verdict import Action

TAILSCALE = Outbound(exclude_marks=(Mark(0x80000, 0xFF0000), Mark(51820)))
TUNNELS = (Interfaces("tun0"), Interfaces("wg+"))


@both_families
@pytest.mark.parametrize(
    ("mark", "excluded"),
    [(0x80000, True), (0x8ABCD, True), (0x180000, False), (51820, True), (51821, False), (0, False)],
)
def test_a_marked_socket_passes_whoever_owns_it(v: int, mark: int, excluded: bool) -> None:
    asked = policy(outbound=TAILSCALE)
    rule = passes("m1") if excluded else goes_to(POUT, "o7")
    assert verdict(asked, out(REMOTE[v], mark=mark)) == rule
    to_self = verdict(asked, out(OWN[v], uid=PROXY, mark=mark))
    assert to_self == (passes("m1") if excluded else goes_to(PIN, "i7"))


@both_families
def test_the_queries_of_a_marked_socket_pass_in_the_zone_of_their_answers(v: int) -> None:
    for asked in (listed(), capture_all(tcp=True)):
        asked = replace(asked, outbound=TAILSCALE)
        assert verdict(asked, query(SERVER[v], mark=51820)) == passes("m1")
        assert verdict(asked, out(SERVER[v], 53, mark=51820)) == passes("m1")
        assert zone(asked, query(SERVER[v], mark=51820)) == UPSTREAM
        assert zone(asked, query(SERVER[v], mark=51821)) == CAPTURED


@both_families
@pytest.mark.parametrize(
    ("name", "excluded"), [("tun0", True), ("tun01", False), ("wg", True), ("wg0", True), ("w", False)]
)
def test_an_excluded_interface_is_left_alone_both_ways(v: int, name: str, excluded: bool) -> None:
    asked = replace(listed(), exclude_interfaces=TUNNELS)
    assert (verdict(asked, out(REMOTE[v], interface=name)) == passes("e1")) is excluded
    assert (verdict(asked, arrives(OWN[v], interface=name)) == passes("e1")) is excluded
    assert (verdict(asked, query(SERVER[v], interface=name)) == passes("e1")) is excluded
    assert zone(asked, query(SERVER[v], interface=name)) == (UPSTREAM if excluded else CAPTURED)


def test_a_part_of_a_virtual_network_can_be_excluded() -> None:
    asked = replace(listed(), virtual_networks=VNETS, exclude_interfaces=(Interfaces("br-dmz"),))
    inside = arrives(SERVER[6], 53, "fd17::5", protocol="udp", interface="br-1", local_destination=False)
    dmz = replace(inside, interface="br-dmz")
    assert verdict(asked, inside)[1] is Action.REDIRECT
    assert verdict(asked, dmz) == passes("e1")
    # It is forwarded, and its answer comes back in the zone of answers.
    assert (zone(asked, inside), zone(asked, dmz)) == (CAPTURED, UPSTREAM)


def test_invalid_packets_of_an_excluded_interface_are_not_dropped() -> None:
    asked = policy(drop_invalid=True, exclude_interfaces=TUNNELS)
    lost = arrives(OWN[4], state=State.INVALID)
    assert verdict(asked, lost)[1] is Action.DROP
    assert verdict(asked, replace(lost, interface="wg0")) == passes("n1")


def test_a_family_that_is_left_alone_comes_first() -> None:
    asked = policy(families=frozenset(), outbound=TAILSCALE, exclude_interfaces=TUNNELS)
    assert verdict(asked, out(REMOTE[4], uid=APP, mark=51820, interface="wg0")) == passes("f1")


@pytest.mark.parametrize(
    ("wide", "narrow", "covers"),
    [("wg+", "wg0", True), ("wg+", "wg0+", True), ("wg0", "wg+", False), ("wg+", "wg+", True), ("tun0", "tun0", True),
     ("tun0", "tun1", False), ("wg+", "w+", False)],
)  # fmt: skip
def test_which_pattern_covers_which(wide: str, narrow: str, covers: bool) -> None:
    assert Interfaces(wide).covers(Interfaces(narrow)) is covers
    assert Interfaces(wide).meets(Interfaces(narrow)) is Interfaces(narrow).meets(Interfaces(wide))


@pytest.mark.parametrize(("value", "mask"), [(0, 1), (2, 1), (1, 0), (1, 2**32), (2**32, 2**32 - 1), (-1, 1)])
def test_a_mark_that_could_match_nothing_or_everything_is_none(value: int, mask: int) -> None:
    with pytest.raises(ValueError, match=r"is not within|has bits outside"):
        Mark(value, mask)
