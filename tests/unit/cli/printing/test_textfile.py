"""The metrics of `tpctl status --prometheus`, the alert rules and the dashboard that use them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml

from tpctl.arrival.check import Report as Arrival
from tpctl.arrival.model import Fate, Kind, Outcome, Probe, Result
from tpctl.change.listening import PortStatus
from tpctl.change.status import Report
from tpctl.cli.printing import textfile
from tpctl.engines.base import Figure, Inspection, RuleCounter
from tpctl.record.state import State
from tpctl.record.taken_back import TakenBack
from tpctl.relay.connections.tally import Tally
from tpctl.relay.figures.metrics import render as render_relay
from tpctl.relay.settings.listen import read_listen
from tpctl.relay.settings.model import ListenerSettings, Role, Settings
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import Policy, Protocol

FOLDER = Path(__file__).resolve().parents[4] / "docs/prometheus"
NAME = re.compile(r"\btpctl_\w+")
NOW = 1_796_099_502.0
promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool here; `make test-prometheus` installs it"
)


def report() -> Report:
    """Everything that there may be."""
    counters = (
        RuleCounter(4, "nat", "OUTPUT", "tpctl/o7: everything else", 3, 180),
        RuleCounter(4, "nat", "OUTPUT", "tpctl/o7: the same, for another set", 2, 20),
        RuleCounter(0, "inet tpctl", "leaving", "tpctl/i3 to i7: whatever else arrives", 1, 60),
        RuleCounter(6, "inet tpctl", "inbound", 'tpctl/to the "own" listener', 1, 60),
    )
    found = Inspection("iptables", "nft", True, (4, 6), counters=counters, figures=(Figure("own dials", 5, 100),))
    ports = (PortStatus("inbound", Protocol.TCP, 15006, (5678,), None), PortStatus("dns", Protocol.UDP, 15053, (), "x"))
    record = State(Policy(5678), installed_at="2026-12-01T04:15:10+00:00")
    trace = TakenBack("install", "2026-12-01T04:11:19+00:00", "nothing")
    return Report(record, found, ports, ("one",), next_boot=("x",), taken_back=trace)


def arrival() -> Arrival:
    connection = Connection(
        Direction.OUTBOUND, "tcp", ip_address("10.0.0.1"), ip_address("10.0.0.2"), 80, "eth0", uid=1
    )
    probe = Probe(Kind.SELF_CALL, connection, decide(Policy(5678), connection))
    return Arrival((Result(probe, Outcome(Fate.PASSED_BY, 0.25, "x")),))


def text() -> str:
    return textfile.render(report(), arrival(), NOW)


def relay() -> str:
    settings = Settings((ListenerSettings("in", Role.INBOUND, read_listen("[::]:15006")),))
    return render_relay(Tally(1), {"in": 0}, settings)


@pytest.mark.parametrize(
    "line",
    [
        'installed{engine="iptables",variant="nft"} 1', "installed_timestamp_seconds 1796098510", "drift 0",
        'listener_up{role="inbound",protocol="tcp",port="15006"} 1',
        'listener_up{role="dns",protocol="udp",port="15053"} 0',
        'listener_fit{role="dns",protocol="udp",port="15053"} 0', "problems 1", "confirm_pending 0",
        "taken_back_timestamp_seconds 1796098279", "next_boot 1", "status_timestamp_seconds 1796099502",
        'engine_figure{figure="own_dials"} 5', 'engine_figure_most{figure="own_dials"} 100',
        'probe_fate{kind="self_call",direction="outbound",family="ipv4",protocol="tcp",fate="passed_by"} 1',
        'probe_fate{kind="self_call",direction="outbound",family="ipv4",protocol="tcp",fate="arrived"} 0',
        'probe_seconds{kind="self_call",direction="outbound",family="ipv4",protocol="tcp"} 0.25',
        'rule_packets_total{family="ipv4",table="nat",chain="OUTPUT",rule="o7"} 5',
        'rule_bytes_total{family="ipv4",table="nat",chain="OUTPUT",rule="o7"} 200',
        'rule_packets_total{family="",table="inet tpctl",chain="leaving",rule="i3_to_i7"} 1',
        'rule_packets_total{family="ipv6",table="inet tpctl",chain="inbound",rule="to_the_own_listener"} 1',
    ],
)  # fmt: skip
def test_what_is_told(line: str) -> None:
    assert f"\ntpctl_{line}\n" in text()


def test_nothing_installed() -> None:
    said = textfile.render(Report(None, Inspection("nftables", None, False), (), ()), None, NOW)
    assert "\ntpctl_installed 0\n" in said
    assert "probe" not in said
    assert "timestamp" not in said.replace("tpctl_status_timestamp_seconds", "")


def names(source: str) -> set[str]:
    return {name for name in NAME.findall(source) if not name.endswith("_")}


def test_alerts_and_dashboard_ask_for_what_there_is() -> None:
    there = names(text()) | names(relay()) | {"tpctl_confirm_remaining_seconds"}
    alerts = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    asked = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(asked) > 30
    assert {name for one in asked for name in names(one)} - there == set()
    for label, value in (
        pair for one in asked for pair in re.findall(r'(\w+)(?:=|!=)"(\w+)"', one) if pair[0] != "job"
    ):
        assert f'{label}="{value}"' in text() + relay(), (label, value)


def test_the_dashboard_is_in_order() -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(places)) == len(places), "panels lie on each other"
    assert max(x for x, _ in places) < 24
    assert all(panel["type"] == "row" or panel["targets"] for panel in panels)


@promtool
@pytest.mark.parametrize("told", [text, relay])
def test_promtool_takes_the_metrics(told: object) -> None:
    assert callable(told)
    done = subprocess.run(["promtool", "check", "metrics"], input=told(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@promtool
def test_promtool_takes_the_alert_rules_and_they_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(FOLDER / "alerts.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = Path(__file__).parents[3] / "fixtures/alerts_test.yaml"
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_reads_every_question_of_the_dashboard(tmp_path: Path) -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    filled = [one.replace("$__rate_interval", "5m").replace("$instance", ".*") for one in asked]
    rules = [{"record": f"r{number}", "expr": one} for number, one in enumerate(filled)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
