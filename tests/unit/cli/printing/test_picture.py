"""`tpctl show`: the picture says what the policy does, and every form of it can be read by what shows it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.equivalence.policies import policies
from tpctl.change.listening import PortStatus
from tpctl.cli.printing.output import UserNames
from tpctl.cli.printing.picture import Box, Lane, Picture, as_mermaid, as_text, picture
from tpctl.cli.printing.picture_svg import as_svg
from tpctl.spec.policy import Dns, DnsCapture, Inbound, Outbound, Policy, PortRange, Protocol

POLICY = Policy(
    5678, inbound=Inbound(exclude_ports=(PortRange(22),)), outbound=Outbound(exclude_ports=(PortRange(3306),)),
    dns=Dns(DnsCapture.ALL),
)  # fmt: skip
PORTS = (
    PortStatus("inbound", Protocol.TCP, 15006, (5678,), None),
    PortStatus("outbound", Protocol.TCP, 15001, (), "nothing listens"),
)


def rows(policy: Policy, engine: str = "nftables") -> list[str]:
    shown = picture(policy, engine, "title", PORTS, UserNames({5678: "kuma-dp"}))
    return [re.sub(" +", " ", line).strip() for line in as_text(shown).splitlines()]


def test_who_goes_where() -> None:
    said = rows(POLICY)
    assert "inbound client --> [PREROUTING] --> [port 15006] --> application" in said
    assert "outbound application --> [OUTPUT] --> [port 15001] --> server" in said
    assert "DNS application --> [OUTPUT] --> [port 15053] --> name server" in said
    assert any("inbound: uid 5678 (kuma-dp)" in line for line in said)
    assert any("outbound: nobody listens" in line for line in said)
    assert "excluded inbound to ports 22" in said
    assert "excluded outbound to ports 3306" in said
    assert "guarded connections opened to 15006, 15001, 15053 from elsewhere, or by applications, are reset" in said


def test_the_ebpf_engine_has_other_hooks() -> None:
    assert "inbound client --> [eBPF] --> [port 15006] --> application" in rows(POLICY, "ebpf")
    assert not any("PREROUTING" in line for line in rows(POLICY, "ebpf"))


def test_what_is_not_redirected_has_no_lane() -> None:
    said = rows(Policy(5678, inbound=Inbound(enabled=False), guard_ports=False))
    assert not any(line.startswith("inbound") for line in said)
    assert {"not redirected inbound TCP", "not redirected DNS"} <= set(said)
    assert not any("guarded" in line for line in said)


@given(policies)
def test_every_form_of_every_policy(policy: Policy) -> None:
    shown = picture(policy, "nftables", "title")
    root = ElementTree.fromstring(as_svg(shown))
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    for lane in shown.lanes:
        assert lane.title in texts
        assert {box.name for box in lane.boxes} <= set(texts)
    assert as_mermaid(shown).count("subgraph") == len(shown.lanes)
    assert as_text(shown).endswith("\n")


@given(st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp")), min_size=1))
def test_names_of_somebody_elses_break_no_form(name: str) -> None:
    shown = Picture(name, (Lane(name, (Box(name, name, "hook"), Box("b"))),), ((name, name),))
    found = [element.text for element in ElementTree.fromstring(as_svg(shown)).iter() if element.text == name]
    assert len(found) >= 5
    _, front, *rest = as_mermaid(shown).split("\n")
    assert yaml.safe_load(front) == {"title": name}
    for line in rest:
        assert line.count('"') in (0, 2), line
