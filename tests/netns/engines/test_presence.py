"""What is known of netfilter's tables by their names alone, beside what the programs say."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.netns.lab import PROXY_USER, bare_namespace, run, tpctl
from tpctl.engines import foreign_tables, presence, registry
from tpctl.engines.absent import Absent
from tpctl.engines.iptables import nft_hooks
from tpctl.engines.listings import Listings
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family
from tpctl.system import netlink

pytestmark = pytest.mark.root


@pytest.fixture
def space() -> Iterator[None]:
    with bare_namespace() as made, made.inside():
        yield


@pytest.fixture
def used(space: None) -> Iterator[None]:
    """The record of what is installed there goes with it."""
    yield
    tpctl("uninstall")


def test_a_new_namespace_holds_nothing(space: None) -> None:
    assert presence.lacks("inet tpctl")
    assert not presence.others()
    assert not presence.may_hold_rules()


@pytest.mark.parametrize("ours", ["inet tpctl", "inet tpctl_answers", "inet tpctl_ebpf", "inet tpctl_trace_1"])
def test_our_own_tables_are_nobody_elses(space: None, ours: str) -> None:
    run(["nft", "add", "table", *ours.split()])
    assert not presence.lacks(ours)
    assert presence.lacks(ours.replace("inet", "ip"))
    assert not presence.others()
    assert not presence.may_hold_rules()


@pytest.mark.parametrize("family", ["inet", "ip", "ip6"])
def test_a_table_of_somebody_elses(space: None, family: str) -> None:
    run(["nft", "add", "table", family, "theirs"])
    assert presence.others()
    assert presence.may_hold_rules() == (family != "inet")


def test_very_many_tables_count_as_everybodys(space: None) -> None:
    run(["nft", "-f", "-"], stdin="".join(f"add table inet tpctl_trace_{number}\n" for number in range(150)))
    assert presence.others()


@pytest.mark.parametrize("tool", ["iptables-nft", "ip6tables-nft"])
def test_a_rule_of_iptables(space: None, tool: str) -> None:
    run([tool, "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT"])
    family = Family.IPV4 if tool.startswith("iptables") else Family.IPV6
    assert [one for one in Family if presence.may_hold_iptables("nft", one)] == [family]
    assert presence.others()
    looking = {engine.name: engine for engine in registry.available(EngineOptions())}
    assert not isinstance(looking["iptables"], Absent)


def test_an_engine_without_anything_in_the_kernel_is_not_loaded(space: None) -> None:
    looking = {engine.name: engine for engine in registry.available(EngineOptions())}
    assert isinstance(looking["iptables"], Absent)
    assert not looking["iptables"].inspect(None).installed
    assert not looking["iptables"].remove().removed
    planning = {engine.name: engine for engine in registry.available(EngineOptions(), planning="iptables")}
    assert not isinstance(planning["iptables"], Absent)


NATIVE = (
    "table inet theirs {}",
    "table ip theirs {}",
    "table ip nat { chain prerouting { type nat hook prerouting priority -100; }; }",
    "table ip filter { chain OUTPUT { type nat hook output priority -100; }; }",
)
"""Tables that iptables-nft lists in another way, or not at all."""


def test_which_tables_iptables_lists(space: None) -> None:
    assert presence.iptables_tables() == frozenset()
    run(["nft", "add", "table", "inet", "tpctl"])
    run(["iptables-nft", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT"])
    run(["ip6tables-nft", "-N", "SITE"])
    assert presence.iptables_tables() == frozenset({("ip", "nat"), ("ip6", "filter")})


@pytest.mark.parametrize("table", NATIVE)
def test_which_tables_only_nft_lists(space: None, table: str) -> None:
    run(["nft", "-f", "-"], stdin=f"{table}\n")
    assert presence.iptables_tables() is None
    if "hook" in table:
        assert [chain.kind for chain in presence.chains() or ()] == ["nat"]


def test_a_listing_that_others_change_meanwhile_is_not_taken_for_whole(space: None) -> None:
    run(["nft", "-f", "-"], stdin="add table ip t\n" + "".join(f"add chain ip t c{number}\n" for number in range(2000)))
    chains = presence.chains()
    assert chains is not None
    assert {chain.name for chain in chains} == {f"c{number}" for number in range(2000)}
    parts = presence.ask(presence.GETCHAIN, socket.AF_UNSPEC, flags=netlink.DUMP, whole=True)
    next(parts)
    run(["nft", "add", "chain", "ip", "t", "one_more"])
    with pytest.raises(BlockingIOError):
        list(parts)


def test_the_footprint_is_what_nft_lists(space: None) -> None:
    assert nft_hooks.existing() == nft_hooks._listed() == frozenset()
    run(["iptables-nft", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT"])
    run(["iptables-nft", "-N", "SITE"])
    run(
        ["nft", "-f", "-"],
        stdin="add table ip6 mangle\nadd table inet raw\nadd chain inet raw c\nadd table ip theirs\n",
    )
    found = nft_hooks.existing()
    assert found == nft_hooks._listed()
    assert found is not None
    assert {("ip", "nat", ""), ("ip", "nat", "OUTPUT"), ("ip", "filter", "SITE"), ("ip6", "mangle", "")} <= found


def test_what_iptables_does_not_understand_in_a_table_of_its_own_is_listed_by_nft(space: None) -> None:
    run(["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "1", "-j", "DROP"])
    assert [(table.program, table.name) for table in foreign_tables.foreign_tables()] == [("iptables-nft", "filter")]
    run(["nft", "add", "rule", "ip", "filter", "INPUT", "ip", "ttl", "vmap", "{ 7 : drop }"])
    run(["nft", "add", "table", "ip", "nat"])
    names = {(table.family, table.name) for table in foreign_tables.foreign_tables()}
    assert {("ip", "filter"), ("ip", "nat")} <= names


def test_a_host_with_nothing_but_rules_of_tpctl(used: None) -> None:
    for variant in ("nft", "legacy"):
        tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables", "--iptables-mode", variant, "--no-probe")
        assert presence.others()
        assert Listings().are_ours(variant)
        assert not Listings().are_ours(None)
        assert not Listings().are_ours({"nft": "legacy", "legacy": "nft"}[variant])


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    "theirs",
    [
        "ip6tables-nft -A FORWARD -j DROP",
        "iptables-legacy -P INPUT DROP",
        "iptables-legacy -t nat -N SITE",
        "nft add table inet theirs",
        "nft add chain ip nat prerouting { type nat hook prerouting priority -100; }",
    ],
)
def test_something_of_others_beside_it(used: None, variant: str, theirs: str) -> None:
    run(["nft", "add", "table", "ip", "nat"])
    run(theirs.split(maxsplit=5) if "{" in theirs else theirs.split())
    tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables", "--iptables-mode", variant, "--no-probe")
    assert not Listings().are_ours(variant)
