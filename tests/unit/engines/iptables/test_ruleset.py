"""The shape of the rules; what they do is tested on real packets in tests/netns."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.engines.iptables.backend import classify
from tpctl.engines.iptables.parts import COMMENT_PREFIX, MULTIPORT_SLOTS, port_matches
from tpctl.engines.iptables.rule import parse
from tpctl.engines.iptables.ruleset import rules_for
from tpctl.spec.policy import (
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    VirtualNetwork,
)
from tpctl.system.errors import HostError, InputError
from tpctl.system.runner import Finished

ports = st.integers(1, 65535)
ranges = st.builds(lambda a, b: PortRange(min(a, b), max(a, b)), ports, ports)


def _covered(texts: list[str]) -> set[int]:
    found: set[int] = set()
    for text in texts:
        for part in text.split(","):
            first, _, last = part.partition(":")
            found |= set(range(int(first), int(last or first) + 1))
    return found


@given(st.lists(ranges, max_size=60).map(tuple))
def test_port_matches_cover_every_port_within_what_multiport_takes(wanted: tuple[PortRange, ...]) -> None:
    texts = []
    for found in port_matches(Protocol.TCP, wanted):
        (option,) = found.options
        texts.append(option.values[0])
        slots = sum(2 if ":" in part else 1 for part in option.values[0].split(","))
        assert found.name == "tcp" or slots <= MULTIPORT_SLOTS
    assert _covered(texts) == {port for item in wanted for port in range(item.first, item.last + 1)}


FULL = Policy(
    proxy_uid=5678,
    inbound=Inbound(
        exclude_ports=(PortRange(22),), exclude_sources=(ip_network("10.1.0.0/16"), ip_network("fd00::/8"))
    ),
    outbound=Outbound(exclude_destinations=(ip_network("10.2.0.0/16"),), insert=True),
    dns=Dns(capture=DnsCapture.ALL, tcp=True),
    virtual_networks=(VirtualNetwork("br+", ip_network("10.3.0.0/16")),),
    drop_invalid=True,
    log_level=7,
)


def test_built_in_chains_only_get_jumps_to_our_chains() -> None:
    for family in Family:
        for table in rules_for(FULL, family).tables:
            names = {name for name, _ in table.chains}
            assert {jump.rule.target for jump in table.jumps} <= names
            assert all(name.startswith("TPCTL_") and len(name) <= 28 for name in names)


def test_every_chain_is_reached_and_every_rule_is_explained() -> None:
    for family in Family:
        for table in rules_for(FULL, family).tables:
            rules = [rule for _, content in table.chains for rule in content] + [jump.rule for jump in table.jumps]
            assert {name for name, _ in table.chains} <= {rule.target for rule in rules}
            assert all((rule.comment or "").startswith(COMMENT_PREFIX) for rule in rules)


def test_families_do_not_mix() -> None:
    text4, text6 = (repr(rules_for(FULL, family)) for family in Family)
    assert "fd00::" not in text4
    assert "10.1.0.0" not in text6
    assert "TPCTL_VNET" not in text6


def test_log_comes_before_every_other_jump() -> None:
    for table in rules_for(FULL, Family.IPV4).tables:
        if table.table == "nat":
            for chain in ("PREROUTING", "OUTPUT"):
                first = min((jump for jump in table.jumps if jump.chain == chain), key=lambda jump: jump.position or 99)
                assert first.rule.target.startswith("TPCTL_LOG_")


def test_a_comment_is_cut_at_a_character_and_fits() -> None:
    policy = Policy(1, virtual_networks=(VirtualNetwork("ü" * 15, ip_network("10.0.0.0/8")),))
    for table in rules_for(policy, Family.IPV4).tables:
        for _, rules in table.chains:
            assert all(len((rule.comment or "").encode()) < 255 for rule in rules)


ONE_SERVICE = dataclasses.replace(FULL, cgroup=Cgroup("system.slice/dev-a\\x2db my.service", 7))


@pytest.mark.parametrize("insert", [False, True])
def test_all_that_leaves_is_kept_to_one_service_and_comes_back_as_it_was_written(insert: bool) -> None:
    policy = dataclasses.replace(ONE_SERVICE, outbound=Outbound(insert=insert))
    for family in Family:
        tables = {table.table: table for table in rules_for(policy, family).tables}
        jumps = [jump.rule for jump in tables["nat"].jumps if jump.chain == "OUTPUT"]
        confined = [rule for rule in jumps if "-m cgroup --path" in rule.render()]
        assert {rule.target for rule in jumps} - {rule.target for rule in confined} == {"TPCTL_LOG_OUTPUT"}
        (queries,) = [rules for name, rules in tables["raw"].chains if name == "TPCTL_ZONE_QUERY"]
        assert [("cgroup" in rule.render(comments=False), rule.target_options[0].values) for rule in queries[-2:]] == [
            (True, ("2",)),
            (False, ("1",)),
        ]
        for rule in confined:
            assert parse(rule.render()) == rule
            assert ("path", ("system.slice/dev-a\\x2db my.service",)) in [
                (option.name, option.values) for match in parse(rule.render()).matches for option in match.options
            ]


def test_a_path_the_kernel_cannot_hold() -> None:
    rules_for(Policy(1, cgroup=Cgroup("a" * 511, 7)), Family.IPV4)
    with pytest.raises(InputError, match="511"):
        rules_for(Policy(1, cgroup=Cgroup("a" * 512, 7)), Family.IPV4)


@pytest.mark.parametrize(
    "said",
    [
        'Warning: Extension cgroup revision 0 not supported, missing kernel module?\nunknown option "--path"',
        "b'cgroup': no such parameter b'path'",
    ],
)
def test_a_kernel_without_the_match(said: str) -> None:
    """As iptables 1.8.9 and python-iptables say it, when the kernel says that it has no such revision."""
    error = classify(Finished(("iptables-restore",), 4, "", said))
    assert isinstance(error, HostError)
    assert "xt_cgroup" in str(error)
