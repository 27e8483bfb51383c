"""The text that replaces one table by another, from what the kernel lists."""

from __future__ import annotations

import pytest

from tpctl.engines.nftables import drain
from tpctl.engines.nftables.nft import Objects
from tpctl.engines.nftables.scratch import blocks
from tpctl.engines.nftables.table import Chain, Hook, Rule, Set, Table
from tpctl.engines.nftables.transaction import preparation, replacement

WANTED = Table(
    (Set("ports", "inet_service", ("22",)),),
    (Chain("output_last", (Rule("", "jump outbound", "x"),), Hook("nat", "output", -99)), Chain("outbound", ())),
)


def listed(*objects: dict[str, object], version: str = "1.0.6") -> Objects:
    return [{"metainfo": {"version": version}}, {"table": {"family": "inet", "name": "tpctl"}}, *objects]


def chain(name: str, priority: int | None = None) -> dict[str, object]:
    hook = {} if priority is None else {"type": "nat", "hook": "output", "prio": priority}
    return {"chain": {"family": "inet", "table": "tpctl", "name": name, **hook}}


def clearing(current: Objects) -> list[str]:
    return replacement(current, WANTED).partition("table inet tpctl {")[0].splitlines()


def test_a_host_without_our_table_is_only_given_the_table() -> None:
    assert replacement(None, WANTED) == WANTED.render()


def test_base_chains_are_kept_and_all_else_is_made_again() -> None:
    found = clearing(listed({"set": {"name": "ports"}}, chain("output_last", -99), chain("outbound")))
    assert found == [
        "flush chain inet tpctl output_last",
        "flush chain inet tpctl outbound",
        "delete set inet tpctl ports",
        "delete chain inet tpctl outbound",
    ]


def test_a_set_that_the_kernel_holds_stays() -> None:
    same = listed({"set": {"name": "ports", "type": "inet_service", "elem": [22]}}, chain("output_last", -99))
    assert not any("set" in line for line in clearing(same))
    assert "set ports" not in replacement(same, WANTED)
    assert preparation(same, WANTED) == ()


@pytest.mark.parametrize("elements", [[], [22, 23], [{"range": [20, 22]}]])
def test_a_set_that_a_stranger_changed_is_made_again(elements: list[object]) -> None:
    changed = listed({"set": {"name": "ports", "type": "inet_service", "elem": elements}}, chain("output_last", -99))
    assert "delete set inet tpctl ports" in clearing(changed)
    assert "set ports" in replacement(changed, WANTED).partition("delete set")[2].partition("\n")[2]


def test_a_set_that_is_not_there_is_prepared() -> None:
    nothing = listed(chain("output_last", -99))
    prepared = preparation(nothing, WANTED)
    assert prepared == WANTED.sets
    assert "set ports" not in replacement(nothing, WANTED, prepared=prepared)
    assert preparation(None, WANTED) == WANTED.sets


@pytest.mark.parametrize(
    ("listed_as", "element"),
    [
        (22, "22"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("2001:db8::1", "2001:db8::1/128"),
        ({"range": [80, 90]}, "80-90"),
        ({"prefix": {"addr": "10.0.0.0", "len": 8}}, "10.0.0.0/8"),
        ({"elem": {"val": {"range": [80, 90]}}}, "80-90"),
        ({"concat": [1000, {"range": [80, 90]}]}, "1000 . 80-90"),
    ],
)
def test_elements_are_recognized_however_they_are_listed(listed_as: object, element: str) -> None:
    wanted = Table((Set("s", "t", (element,)),), ())
    current = listed({"set": {"name": "s", "type": "t", "elem": [listed_as]}})
    assert "set s" not in replacement(current, wanted)


def test_a_base_chain_that_is_not_wanted_or_hooked_elsewhere_goes() -> None:
    found = clearing(listed(chain("output_first", -101), chain("output_last", -100)))
    assert found[2:] == ["delete chain inet tpctl output_first", "delete chain inet tpctl output_last"]


def test_a_table_that_cannot_be_filled_again_is_made_again() -> None:
    whole = ["delete table inet tpctl"]
    asleep: Objects = [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "tpctl", "flags": ["dormant"]}}]
    assert clearing(asleep) == whole
    assert clearing(listed({"counter": {"name": "c"}})) == whole
    assert clearing(listed(chain("outbound"), version="0.9.8")) == whole


def test_ports_are_recovered_from_redirects_and_from_leftovers() -> None:
    rules = listed(
        {"rule": {"chain": "a", "expr": [{"counter": {}}, {"redirect": {"port": 15001}}]}},
        {"rule": {"chain": "a", "expr": [{"accept": None}]}},
    )
    assert drain.redirected_ports(rules) == (15001,)
    left = listed({"set": {"name": drain.PORTS, "elem": [15001, {"range": [15005, 15006]}]}})
    assert drain.redirected_ports(left) == (15001, 15005, 15006)
    assert drain.is_leftover(left)
    assert not drain.is_leftover(rules)


def test_leftovers_redirect_nothing() -> None:
    text = drain.leftover(listed({"rule": {"chain": "a", "expr": [{"redirect": {"port": 15001}}]}}))
    assert text.startswith("delete table inet tpctl\ntable inet tpctl {")
    assert "redirect" not in text
    assert "elements = { 15001 }" in text


def test_a_listing_is_taken_apart_by_chain_and_set() -> None:
    listing = (
        "table inet tpctl {\n\tset s {\n\t\ttype uid\n\t\telements = { 1,\n\t\t\t     2 }\n\t}\n\n\tchain c {\n\t}\n}\n"
    )
    assert blocks(listing) == {"set s": ["type uid", "elements = { 1,", "2 }"], "chain c": []}
