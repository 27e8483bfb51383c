"""The shape of the rules; what they do is tested on real packets in tests/netns."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from agent.engines.iptables.parts import COMMENT_PREFIX, MULTIPORT_SLOTS, port_matches
from agent.engines.iptables.ruleset import rules_for
from agent.policy import Dns, DnsCapture, Family, Inbound, Outbound, Policy, PortRange, Protocol, VirtualNetwork

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
