"""A probe that was lost: the rule that took it is named, or the kernel's own reason, with a remedy that works."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.netns.arrival.test_foreign_filters import (
    LOST_SECONDS,
    OF_IPTABLES,
    OF_NFT,
    POLICY,
    connection,
    expect_arrival,
    redirecting,
)
from tests.netns.lab import run, snapshot
from tpctl.arrival import drop_reasons
from tpctl.arrival.diagnosis import diagnose
from tpctl.arrival.drop_reasons import DropReasons, NoReasonsError
from tpctl.arrival.model import Again, Fate, Finding, Kind, Outcome, Probe
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS
from tpctl.spec.decide import decide
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

_PORTS = itertools.count(21000)
HELD = """
import sys, time
from ipaddress import ip_address
from tpctl.arrival.tracing import Trace
from tpctl.spec.policy import Family
with Trace(Family.IPV4, [ip_address("198.51.100.7")]):
    print("traced", flush=True)
    time.sleep(60)
"""

HEARING = """
import time
from tpctl.arrival.drop_reasons import DropReasons
with DropReasons():
    print("heard", flush=True)
    time.sleep(60)
"""


def lost(lab: Lab, way: str, family: Family) -> Probe:
    asked = connection(lab, way, family)
    return Probe(Kind.INBOUND if way == "in" else Kind.OUTBOUND, asked, decide(POLICY, asked))


def sender(lab: Lab) -> Again:
    def again(probe: Probe) -> tuple[Probe, Outcome]:
        asked = dataclasses.replace(probe.connection, source_port=next(_PORTS))
        answer = lab.dial(asked, timeout=LOST_SECONDS)
        fate = Fate.ARRIVED if answer.seat and answer.seat.port in (15001, 15006) else Fate.LOST
        return dataclasses.replace(probe, connection=asked), Outcome(fate, 0, str(answer))

    return lambda probes: [again(probe) for probe in probes]


def found(lab: Lab, way: str, family: Family, again: Again | None = None) -> Finding:
    with lab.inside(HOST):
        before = snapshot(counters=False)
        (finding,) = diagnose([lost(lab, way, family)], again or sender(lab))
        assert snapshot(counters=False) == before
    assert finding is not None
    return finding


@contextlib.contextmanager
def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """The diagnosis without some of its means: what is left has to find it as well."""
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(f"tpctl.arrival.diagnosis._Diagnosis.{name}", lambda *_: None)
        yield


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("name", OF_IPTABLES)
def test_a_rule_of_iptables(name: str, family: Family, variant: str) -> None:
    script, way, owner, place = OF_IPTABLES[name]
    with redirecting() as lab:
        tool = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{variant}"
        text = script.format(
            t=tool, s="" if family is Family.IPV4 else "6", own=HOST_ADDRESS[family], link=lab.layout.uplinks[0].name,
            remote_net="198.51.100.0/24" if family is Family.IPV4 else "2001:db8:51::/48",
        )  # fmt: skip
        with lab.inside(HOST):
            run(["sh", "-ec", text])
        finding = found(lab, way, family)
        assert finding.whose == owner
        assert place.split(":")[0].split()[-1] in finding.where
        assert tool in finding.where
        assert finding.remedy
        if owner != "ufw":  # which is not at work here
            with lab.inside(HOST):
                run(["sh", "-ec", finding.remedy.split(" (")[0]])
            expect_arrival(lab, way, family)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("name", OF_NFT)
def test_a_rule_of_nft_is_traced(name: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    script, way, place = OF_NFT[name]
    with redirecting() as lab:
        ip = "ip" if family is Family.IPV4 else "ip6"
        with lab.inside(HOST):
            text = script.format(ip=ip, own=HOST_ADDRESS[family], link=lab.layout.uplinks[0].name)
            run(["nft", "-f", "-"], stdin=text)
        with without(monkeypatch, "foreseen", "_counted", "_astray"):
            finding = found(lab, way, family)
        assert place in finding.where
        assert finding.whose == "an administrator"
        with lab.inside(HOST):
            run(["sh", "-ec", (finding.remedy or "").split(" (")[0]])
        expect_arrival(lab, way, family)


@pytest.mark.parametrize(
    "rule",
    ["tcp dport 15006 numgen inc mod 1 == 0 drop;", "ip length 40-80 meta l4proto tcp reject;"],
)
def test_what_nobody_can_foresee_is_traced(rule: str) -> None:
    """With the chains by which it was reached."""
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["nft", "-f", "-"], stdin="add table inet odd; add chain inet odd d; "
                f"add chain inet odd c {{ type filter hook input priority 5; }}; add rule inet odd d {rule} "
                "add rule inet odd c jump d;")  # fmt: skip
        finding = found(lab, "in", Family.IPV4)
        assert "inet odd c > d: " in finding.where
        with lab.inside(HOST):
            run(["sh", "-ec", (finding.remedy or "").split(" (")[0]])
        expect_arrival(lab, "in", Family.IPV4)


def test_a_rule_of_the_legacy_variant_is_told_by_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that may match, the one that did."""
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["iptables-legacy", "-A", "INPUT", "-m", "length", "--length", "2000:3000", "-j", "DROP"])
            run(["iptables-legacy", "-A", "INPUT", "-m", "length", "--length", "40:100", "-j", "DROP"])
        with without(monkeypatch, "foreseen"):
            finding = found(lab, "in", Family.IPV4)
        assert "-m length --length 40:100 -j DROP" in finding.where


def has_reasons() -> bool:
    try:
        with DropReasons():
            return True
    except NoReasonsError:
        return False


def instances() -> list[str]:
    with drop_reasons._mounted() as root:
        return [one.name for one in (root / "instances").iterdir() if one.name.startswith(drop_reasons.PREFIX)]


def no_reasons(_: object) -> None:
    raise NoReasonsError


@pytest.mark.parametrize("reasons", [True, False])
def test_the_reverse_path_filter(monkeypatch: pytest.MonkeyPatch, reasons: bool) -> None:
    if reasons and not has_reasons():
        pytest.skip("this kernel does not say why it drops packets")
    if not reasons:
        monkeypatch.setattr(DropReasons, "__init__", no_reasons)
    with redirecting() as lab:
        expect_arrival(lab, "in", Family.IPV4)  # the peer has to know this host's link address: ARP is filtered as well
        with lab.inside(HOST):
            run(["ip", "link", "add", "quiet", "type", "veth", "peer", "name", "far"])
            run(["ip", "link", "set", "quiet", "up"])
            run(["ip", "link", "set", "far", "up"])
            run(["ip", "route", "add", "198.51.100.0/24", "dev", "quiet"])
            run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
        finding = found(lab, "in", Family.IPV4)
        assert ("drop reason IP_RPFILTER in " if reasons else "IPReversePathFilter has risen") in finding.where
        with lab.inside(HOST):
            run(["sh", "-ec", finding.remedy or ""])
        still = found(lab, "in", Family.IPV4)  # it passes the filter now; its answer goes elsewhere
        assert "its answer leaves by quiet" in still.where
        with lab.inside(HOST):
            run(["ip", "route", "del", "198.51.100.0/24", "dev", "quiet"])
        expect_arrival(lab, "in", Family.IPV4)


@pytest.mark.parametrize("family", Family)
def test_an_ipsec_policy(family: Family) -> None:
    """No table knows of it."""
    if not has_reasons():
        pytest.skip("this kernel does not say why it drops packets")
    with redirecting() as lab:
        asked = connection(lab, "in", family)
        policy = f"ip xfrm policy add dir in src {asked.source} dst {asked.destination} action block"
        with lab.inside(HOST):
            if subprocess.run(policy.split(), capture_output=True, check=False).returncode:
                pytest.skip("this kernel has no IPsec")
        assert "XFRM_POLICY" in found(lab, "in", family).where


def test_nothing_stays_of_drop_reasons() -> None:
    """Neither at their end, nor after the next time when they were killed; and nobody removes what another one uses."""
    if not has_reasons():
        pytest.skip("this kernel does not say why it drops packets")
    with subprocess.Popen([sys.executable, "-c", HEARING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "heard\n"
        name = f"{drop_reasons.PREFIX}{process.pid}"
        with DropReasons():
            assert {name, f"{drop_reasons.PREFIX}{os.getpid()}"} <= set(instances())
        assert name in instances()
        assert f"{drop_reasons.PREFIX}{os.getpid()}" not in instances()
        process.kill()
    drop_reasons.remove_left_over()
    assert name not in instances()


@pytest.mark.parametrize("family", Family)
def test_an_answer_that_a_mark_sends_another_way(family: Family) -> None:
    flag = "-4" if family is Family.IPV4 else "-6"
    tool = "iptables-nft" if family is Family.IPV4 else "ip6tables-nft"
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["ip", "link", "add", "quiet", "type", "veth", "peer", "name", "far"])
            run(["ip", "link", "set", "quiet", "up"])
            run(["ip", "link", "set", "far", "up"])
            run(
                [tool, "-t", "mangle", "-A", "OUTPUT", "-p", "tcp", "--sport", "15006", "-j", "MARK", "--set-mark", "9"]
            )
            run(["ip", flag, "rule", "add", "fwmark", "9", "lookup", "99", "priority", "50"])
            run(["ip", flag, "route", "add", "default", "dev", "quiet", "table", "99"])
        finding = found(lab, "in", family)
        assert "its answer leaves by quiet" in finding.where
        with lab.inside(HOST):
            run(["sh", "-ec", finding.remedy or ""])
        expect_arrival(lab, "in", family)


def test_what_arrives_the_second_time_is_explained_by_nothing() -> None:
    with redirecting() as lab, lab.inside(HOST):
        assert diagnose([lost(lab, "in", Family.IPV4)], sender(lab)) == (None,)


def test_several_are_sent_at_once_and_told_apart() -> None:
    with redirecting() as lab, lab.inside(HOST):
        run(["iptables-nft", "-P", "INPUT", "DROP"])
        run(["ip6tables-nft", "-A", "OUTPUT", "-p", "tcp", "--dport", "15001", "-j", "DROP"])
        sent: list[int] = []
        again = sender(lab)

        def counted(probes: Sequence[Probe]) -> list[tuple[Probe, Outcome]]:
            sent.append(len(probes))
            return again(probes)

        probes = [lost(lab, way, family) for family in Family for way in ("in", "out")]
        findings = diagnose(probes, counted)
    assert sent == [4]
    places = [finding and finding.where for finding in findings]
    assert places[2] is None
    assert all("iptables-nft filter INPUT: policy DROP" in (place or "") for place in places[:2])
    assert "--dport 15001 -j DROP" in (places[3] or "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_of_a_trace_that_was_killed(number: int) -> None:
    with redirecting() as lab, lab.inside(HOST):
        with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "traced\n"
            assert "tpctl_trace" in run(["nft", "list", "tables"]).stdout
            os.kill(process.pid, number)
        _until(lambda: "tpctl_trace" not in run(["nft", "list", "tables"]).stdout)


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
