"""The shape of the table; what it does is tested on real packets in tests/netns."""

from __future__ import annotations

import dataclasses
import re
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tpctl.engines.nftables import cgroup
from tpctl.engines.nftables.engine import NftablesPlan
from tpctl.engines.nftables.parts import interface
from tpctl.engines.nftables.probe import EVERYTHING
from tpctl.engines.nftables.ruleset import table_for
from tpctl.engines.nftables.table import COMMENT_LIMIT, Rule, Table
from tpctl.host import cgroups
from tpctl.spec.policy import (
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)
from tpctl.system.errors import InputError

ALL_DNS = dataclasses.replace(EVERYTHING, dns=Dns(DnsCapture.ALL, tcp=True))
POLICIES = (Policy(1), EVERYTHING, ALL_DNS, dataclasses.replace(EVERYTHING, families=frozenset({Family.IPV4})))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_rule_counts_and_is_explained(policy: Policy) -> None:
    text = table_for(policy).render()
    rules = [line for line in text.splitlines() if "counter" in line]
    assert len(rules) == sum(len(chain.rules) for chain in table_for(policy).chains)
    assert all(re.search(r' comment "tpctl/[^"]+"$', line) for line in rules)
    assert 'comment "' not in table_for(policy).render(comments=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_called_chain_is_defined_and_every_set_is_used(policy: Policy) -> None:
    table = table_for(policy)
    text = table.render()
    called = {chain.name for chain in table.chains if chain.hook is None}
    assert set(re.findall(r"(?:jump|goto) (\w+)", text)) == called
    assert set(re.findall(r"@(\w+)", text)) == {item.name for item in table.sets}
    assert all(chain.rules for chain in table.chains)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_rule_negates_an_owner(policy: Policy) -> None:
    """`skuid !=` does not match packets without an owner."""
    assert "skuid !=" not in table_for(policy).render()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_chain_of_nat_stands_at_the_priority_of_everybody(policy: Policy) -> None:
    priorities = {chain.hook.priority for chain in table_for(policy).chains if chain.hook and chain.hook.kind == "nat"}
    assert priorities <= {-101, -99, -98, 99}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_of_chains_has_no_meaning(policy: Policy) -> None:
    """Base chains stay when a policy is replaced, the others are made again, and one that comes back is the last."""
    hooks = [chain.hook for chain in table_for(policy).chains]
    based = [(hook.hook, hook.priority) for hook in hooks if hook]
    assert len(set(based)) == len(based), "of two with the same priority the kernel runs the one made last first"
    assert None not in hooks[: len(based)], "called chains keep their place behind those that stay"


def test_a_family_that_is_left_alone_is_in_no_match() -> None:
    text = table_for(dataclasses.replace(EVERYTHING, families=frozenset({Family.IPV4}))).render()
    assert "ip6 " not in text
    base_rules = [
        rule for chain in table_for(dataclasses.replace(ALL_DNS, families=frozenset({Family.IPV4}))).chains
        if chain.hook for rule in chain.rules
    ]  # fmt: skip
    assert all("nfproto ipv4" in rule.match or "ip " in rule.match for rule in base_rules)


def test_insert_goes_before_the_rules_of_others() -> None:
    inserted = table_for(Policy(1, outbound=Outbound(insert=True)))
    assert {"output_first", "output_last"} <= {chain.name for chain in inserted.chains}
    assert "output_first" not in {chain.name for chain in table_for(Policy(1)).chains}


def test_the_log_comes_before_whatever_redirects() -> None:
    for chain in table_for(EVERYTHING).chains:
        if chain.name in ("prerouting_first", "prerouting_last", "output_first"):
            assert chain.rules[0].action.startswith("log prefix"), chain.name


def test_thousands_of_exclusions_are_one_rule() -> None:
    ports = tuple(PortRange(port) for port in range(1, 4000, 2))
    networks = tuple(ip_network(f"10.{a}.{b}.0/24") for a in range(20) for b in range(0, 250, 2))
    many = table_for(Policy(1, outbound=Outbound(exclude_ports=ports, exclude_destinations=networks)))
    few = table_for(Policy(1, outbound=Outbound(exclude_ports=ports[:1], exclude_destinations=networks[:1])))
    assert [len(chain.rules) for chain in many.chains] == [len(chain.rules) for chain in few.chains]
    assert {item.name.rpartition("_")[0]: len(item.elements) for item in many.sets} == {
        "guarded_ports": 3,
        "this_host_v4": 2,
        "this_host_v6": 3,
        "excluded_outbound_ports": 2000,
        "excluded_destinations_v4": 2500,
    }


@pytest.mark.parametrize("width", [1, 3])
def test_thousands_of_users_with_ports_of_their_own_are_one_rule_and_one_set(width: int) -> None:
    def table(count: int) -> Table:
        excluded = (
            UidExclusion(Protocol.TCP, (PortRange(1 + n, n + width),), UidRange(1000 + 2 * n)) for n in range(count)
        )
        return table_for(Policy(1, outbound=Outbound(exclude_uids=tuple(excluded))))

    few, many = table(2), table(8000)
    assert [len(chain.rules) for chain in many.chains] == [len(chain.rules) for chain in few.chains]
    assert len(many.sets) == len(few.sets)
    assert max(len(item.elements) for item in many.sets) == 8000


def test_ranges_of_users_with_ports_of_their_own_need_no_set() -> None:
    excluded = tuple(
        UidExclusion(Protocol.TCP, (PortRange(1 + n),), UidRange(1000 * n, 1000 * n + 500)) for n in range(4000)
    )
    assert not [
        item for item in table_for(Policy(1, outbound=Outbound(exclude_uids=excluded))).sets if "uids" in item.name
    ]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("eth0", '"eth0"'), ("br+", '"br*"'), ("+", ""), ("a*", '"a\\*"'), ("a*b", '"a*b"'), ("br-1.5", '"br-1.5"')],
)
def test_interface_patterns(pattern: str, text: str) -> None:
    assert interface(pattern) == text


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_an_interface_nft_cannot_name_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        table_for(Policy(1, virtual_networks=(VirtualNetwork(name, ip_network("10.0.0.0/8")),)))


def test_comments_fit_the_kernel() -> None:
    assert len(Rule("", "accept", "é" * 200).note.encode()) <= COMMENT_LIMIT
    assert '"' not in Rule("", "accept", 'a "quoted" thing').note


def test_servers_of_a_family_are_one_set() -> None:
    servers = tuple(NameServer(ip_address(text)) for text in ("9.9.9.9", "9.9.9.9", "8.8.8.8", "2620:fe::fe"))
    text = NftablesPlan(table_for(Policy(1, dns=Dns(DnsCapture.LISTED, servers=servers)))).render()
    assert "elements = { 9.9.9.9, 8.8.8.8 }" in text
    assert "elements = { 2620:fe::fe }" in text


SERVICE = Cgroup("system.slice/app.service", 7)


@pytest.mark.parametrize("insert", [False, True])
def test_all_that_leaves_is_kept_to_one_service(insert: bool) -> None:
    policy = dataclasses.replace(EVERYTHING, outbound=Outbound(insert=insert), cgroup=SERVICE)
    rules = {chain.name: chain.rules for chain in table_for(policy).chains}
    inside = 'socket cgroupv2 level 2 "system.slice/app.service"'
    for rule in (*rules["output_first"], *rules["output_last"]):
        assert (inside in rule.match) == rule.action.startswith("jump"), rule
    assert [(rule.match, rule.action) for rule in rules["zone_query"][-2:]] == [
        (inside, "ct zone set 2 accept"),
        ("", "ct zone set 1 accept"),
    ]
    assert "cgroupv2 level 2 !=" not in table_for(policy).render()


def test_nft_is_led_to_where_the_hierarchy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = table_for(Policy(1, cgroup=SERVICE)).render()
    monkeypatch.setattr(cgroups, "find", lambda path: Cgroup(path, 7))
    monkeypatch.setattr(cgroups, "root", lambda: Path("/sys/fs/cgroup"))
    assert cgroup.found_by_nft(text, SERVICE) == text
    monkeypatch.setattr(cgroups, "root", lambda: Path("/sys/fs/cgroup/unified"))
    found = cgroup.found_by_nft(text, SERVICE)
    assert found.count('level 2 "../../../sys/fs/cgroup/unified/system.slice/app.service"') == 1
    assert f'level 2 "{SERVICE}"' not in found
