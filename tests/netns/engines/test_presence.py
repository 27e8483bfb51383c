"""What is known of netfilter's tables by their names alone, beside what the programs say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.lab import bare_namespace, run
from tpctl.engines import presence, registry
from tpctl.engines.absent import Absent
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root


@pytest.fixture
def space() -> Iterator[None]:
    with bare_namespace() as made, made.inside():
        yield


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
