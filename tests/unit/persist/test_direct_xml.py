"""Our elements in firewalld's direct.xml: in, out, and not a byte of anybody else's moved."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ElementTree
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.engines import direct
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.persist import direct_xml
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, VirtualNetwork

RICH = Policy(
    proxy_uid=5678,
    inbound=Inbound(insert=True),
    outbound=Outbound(insert=True),
    dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("10.0.0.53")), NameServer(ip_address("fd00::53")))),
    virtual_networks=(VirtualNetwork("docker0", ip_network("172.17.0.0/16")),),
    drop_invalid=True,
    log_level=7,
)
PLANS = [
    IptablesPlan.of_policy(policy, EngineOptions(comments=c)) for policy in (Policy(5678), RICH) for c in (True, False)
]
OTHERS = """\
<?xml version="1.0" encoding="utf-8"?>
<!-- kept by hand: see the runbook -->
<direct>
\t<chain ipv="ipv4" table="filter" chain="SITE"/><!-- TPCTL_ is only mentioned -->

  <rule priority="0" ipv="ipv4"   table="filter" chain='SITE'>-s 10.0.0.0/8 -m comment --comment "not TPCTL_INBOUND's" \
-j ACCEPT</rule>
    <passthrough ipv="ipv6">-A FORWARD -j SITE_LOG</passthrough>

</direct>
<!-- end -->
"""


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "content",
    [
        OTHERS, OTHERS.replace("\n", "\r\n"), direct_xml.EMPTY.decode(), "<direct></direct>", "<direct>\n\n</direct>",
        "<direct><chain ipv='ipv4' table='nat' chain='X'/></direct>", "<direct >\n  <!-- x -->  </direct >\n\n",
    ],
)  # fmt: skip
def test_in_and_out_again_is_the_same_file(content: str, plan: IptablesPlan) -> None:
    before = content.encode()
    after = direct_xml.with_rules(before, direct.of_plan(plan))
    assert direct_xml.holds_ours(after)
    assert not direct_xml.holds_ours(before)
    assert direct_xml.without_ours(after) == before
    assert direct_xml.with_rules(after, direct.of_plan(plan)) == after


def test_an_element_without_content_is_opened() -> None:
    after = direct_xml.with_rules(b"<direct/>\n", direct.of_plan(PLANS[0]))
    assert after.startswith(b"<direct>\n  <chain ipv=")
    assert direct_xml.without_ours(after) == b"<direct>\n</direct>\n"


@given(st.lists(st.sampled_from([
    '<chain ipv="ipv4" table="nat" chain="TPCTL_DNS"/>', "<!-- a > b -->", "\n  ", " ", "\r\n", "<other a='>'/>",
    '<rule ipv="ipv4" table="nat" chain="KUMA_MESH_X" priority="0">-j RETURN</rule>',
    '<rule ipv="ipv6" table="nat" chain="OUTPUT" priority="3">-p tcp -j TPCTL_OUTBOUND</rule>',
    '<rule ipv="ipv4" table="nat" chain="A" priority="0">-m comment --comment \'TPCTL_DNS &lt;\' -j RETURN</rule>',
    '<passthrough ipv="ipv4">-t nat -A OUTPUT -m comment --comment tpctl/x -j RETURN</passthrough>',
    '<passthrough ipv="ipv4">-A "unfinished -j TPCTL_DNS</passthrough>',
])))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_only_ours_go_wherever_they_stand(pieces: list[str]) -> None:
    content = f"<direct>{''.join(pieces)}</direct>".encode()
    rest = direct_xml.without_ours(content)
    assert not direct_xml.holds_ours(rest)
    theirs = [element for element in ElementTree.fromstring(content) if not _owned(element)]
    assert [_value(element) for element in ElementTree.fromstring(rest)] == [_value(element) for element in theirs]
    assert rest.count(b"<!-- a > b -->") == content.count(b"<!-- a > b -->")
    assert direct_xml.without_ours(direct_xml.with_rules(rest, direct.of_plan(PLANS[0]))) == rest


def _owned(element: ElementTree.Element) -> bool:
    text = element.text or ""
    return element.get("chain", "").startswith(("TPCTL_", "KUMA_MESH_")) or text.endswith("-j TPCTL_OUTBOUND")


def _value(element: ElementTree.Element) -> tuple[str, dict[str, str], str | None]:
    return element.tag, dict(element.attrib), element.text


@pytest.mark.parametrize("plan", PLANS)
def test_every_chain_and_rule_of_the_plan_is_there_in_order(plan: IptablesPlan) -> None:
    root = ElementTree.fromstring(direct_xml.with_rules(direct_xml.EMPTY, direct.of_plan(plan)))
    for rules in plan.families:
        ipv = f"ipv{int(rules.family)}"
        for table in rules.tables:
            chains = [one.get("chain") for one in root.iter("chain") if (one.get("ipv"), one.get("table")) == (
                ipv, table.table)]  # fmt: skip
            assert chains == [name for name, _ in table.chains]
            for name, content in table.chains:
                stored = _stored(root, ipv, table.table, name)
                assert stored == [_arguments(rule.render(comments=plan.comments)) for rule in content]
            for builtin in ("PREROUTING", "OUTPUT"):
                jumps = [jump for jump in table.jumps if jump.chain == builtin]
                jumps.sort(key=lambda jump: jump.position is None)
                stored = _stored(root, ipv, table.table, builtin)
                assert stored == [_arguments(jump.rule.render(comments=plan.comments)) for jump in jumps]


def _arguments(text: str) -> list[str]:
    from tpctl.engines.iptables.rule import split

    return [word for word, _ in split(text)]


def _stored(root: ElementTree.Element, ipv: str, table: str, chain: str) -> list[list[str]]:
    """The rules of one chain in the order of their priorities, which must all differ."""
    found = {
        int(rule.get("priority", "")): shlex.split(rule.text or "")
        for rule in root.iter("rule")
        if (rule.get("ipv"), rule.get("table"), rule.get("chain")) == (ipv, table, chain)
    }
    return [found[priority] for priority in sorted(found)]


@pytest.mark.parametrize(
    "content", ["", "<direct>", "<zone/>", "<direct></direct><direct/>", "\xff", "<direct><chain ipv=></direct>"]
)
def test_what_cannot_be_read_is_refused(content: str) -> None:
    with pytest.raises(direct_xml.UnreadableError):
        direct_xml.with_rules(content.encode("latin-1"), direct.of_plan(PLANS[0]))
