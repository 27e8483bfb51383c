"""Beside real firewalls: what they do to redirected connections is foreseen, and their own words mend it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.arrival.real import Ufw, fail2ban
from tests.netns.arrival.test_diagnosis import found
from tests.netns.arrival.test_foreign_filters import LOST_SECONDS, POLICY, connection, expect_arrival, redirecting
from tests.netns.firewall import Firewall, firewall
from tests.netns.lab import PROXY, run
from tpctl.arrival import notices
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST
from tpctl.spec.policy import Family, Inbound, Policy, Redirection

pytestmark = pytest.mark.root
BOTH = [(way, family) for way in ("in", "out") for family in Family]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with redirecting() as made:
        yield made


def commands(problems: tuple[str, ...]) -> list[str]:
    return [line.partition("; to let them pass: ")[2] for line in problems]


def said(lab: Lab, policy: Policy = POLICY) -> tuple[tuple[str, ...], tuple[str, ...]]:
    with lab.inside(HOST):
        return notices.problems(policy, "nftables"), notices.bypasses(policy, "nftables")


@pytest.mark.skipif(not shutil.which("ufw"), reason="no ufw here")
def test_ufw(lab: Lab, tmp_path: Path) -> None:
    ufw = Ufw(tmp_path, lab.spaces[HOST])
    for command in ("allow 8080/tcp", "default deny outgoing", "allow out 443/tcp", "--force enable"):
        ufw.run(f"ufw {command}")
    for way, family in BOTH:
        assert lab.dial(connection(lab, way, family), timeout=LOST_SECONDS).seat is None
    problems, bypasses = said(lab)
    assert len(problems) == 4
    assert all("rule of ufw" in line for line in problems)
    assert bypasses == ()  # nobody gets through at all
    finding = found(lab, "in", Family.IPV6)
    assert (finding.whose, finding.remedy) == ("ufw", "ufw allow in proto tcp to any port 15006")
    for command in commands(problems):
        ufw.run(command)
    for way, family in BOTH:
        expect_arrival(lab, way, family)
    problems, bypasses = said(lab)
    assert problems == ()
    assert len(bypasses) == 1  # now every port can be reached through the data plane
    assert "ufw does not refuse redirected connections" in bypasses[0]
    assert "filter INPUT: policy DROP" in bypasses[0]
    assert said(lab, Policy(PROXY, inbound=Inbound(mode=Redirection.TPROXY)))[1] == ()


@pytest.mark.skipif(not shutil.which("ufw"), reason="no ufw here")
def test_a_ban_of_ufws(lab: Lab, tmp_path: Path) -> None:
    ufw = Ufw(tmp_path, lab.spaces[HOST])
    for command in ("default allow incoming", "deny proto tcp from 198.51.100.7 to any port 8080", "--force enable"):
        ufw.run(f"ufw {command}")
    problems, bypasses = said(lab)
    assert problems == ()
    assert any("ufw-user-input: -s 198.51.100.7/32 -p tcp -m tcp --dport 8080 -j DROP" in line for line in bypasses)
    expect_arrival(lab, "in", Family.IPV4)
    ufw.run("ufw prepend deny from 198.51.100.7")  # as docs/security.md advises
    assert lab.dial(connection(lab, "in", Family.IPV4), timeout=LOST_SECONDS).seat is None


@pytest.mark.parametrize("program", ["iptables", "nftables"])
@pytest.mark.skipif(not shutil.which("fail2ban-server"), reason="no fail2ban here")
def test_a_ban_of_fail2bans(lab: Lab, tmp_path: Path, program: str) -> None:
    """By default of the service's port, which the banned host is not asked for; of every port it holds."""
    for action, holds in ((f"{program}-multiport", False), (f"{program}-allports", True)):
        directory = tmp_path / action
        directory.mkdir()
        with fail2ban(directory, lab.spaces[HOST], action) as server:
            run(["fail2ban-client", "-s", str(server), "set", "app", "banip", "198.51.100.7"])
            problems, bypasses = said(lab)
            assert problems == ()
            assert [line for line in bypasses if "fail2ban does not refuse" in line] == (
                [] if holds else list(bypasses)
            )
            assert bool(bypasses) is not holds
            arrives = lab.dial(connection(lab, "in", Family.IPV4), timeout=LOST_SECONDS).seat is not None
            assert arrives is not holds


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.skipif(not shutil.which("firewalld") or not shutil.which("dbus-daemon"), reason="no firewalld here")
def test_firewalld(lab: Lab, tmp_path: Path, backend: str) -> None:
    """Its zones accept whatever was translated, and RFC3964_IPv4 rejects ::1 by other interfaces than lo."""
    with firewall(tmp_path, backend, lab.spaces[HOST]) as daemon:
        accepts = daemon_accepts_translated(daemon, backend)
        problems, bypasses = said(lab)
        assert [line for line in bypasses if "firewalld does not refuse redirected connections" in line]
        for way, family in BOTH:
            if (way, family) != ("out", Family.IPV6):
                expect_arrival(lab, way, family)
        if not accepts:
            assert lab.dial(connection(lab, "out", Family.IPV6), timeout=LOST_SECONDS).seat is None
            (line,) = problems
            assert "a rule of firewalld rejects redirected connections at port 15001" in line
            assert "RFC3964_IPv4=no" in line
            settings = tmp_path / "firewalld.conf"
            settings.write_text(re.sub(r"^RFC3964_IPv4=.*$", "RFC3964_IPv4=no", settings.read_text(), flags=re.M))
            daemon.run(["firewall-cmd", "--reload"])
        assert said(lab)[0] == ()
        expect_arrival(lab, "out", Family.IPV6)


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.skipif(not shutil.which("firewalld") or not shutil.which("dbus-daemon"), reason="no firewalld here")
def test_a_ban_of_firewallds(lab: Lab, tmp_path: Path, backend: str) -> None:
    """It accepts what was redirected before it asks zones and rich rules; a direct rule in raw comes before both."""
    rich = ["--add-rich-rule=rule family=ipv4 source address=198.51.100.7 drop"]
    direct = ["--direct", "--add-rule", "ipv4", "raw", "PREROUTING", "0", "-s", "198.51.100.7", "-j", "DROP"]
    with firewall(tmp_path, backend, lab.spaces[HOST]) as daemon:
        for ban, holds in ((rich, False), (direct, True)):
            daemon.run(["firewall-cmd", "--permanent", *ban])
            daemon.run(["firewall-cmd", "--reload"])
            end = lab.dial(connection(lab, "in", Family.IPV4), timeout=LOST_SECONDS)
            assert (end.seat is None) is holds
            expect_arrival(lab, "in", Family.IPV6)


def daemon_accepts_translated(daemon: Firewall, backend: str) -> bool:
    """Whether it lets this host's own translated connections out before anything else, as firewalld 2 does."""
    if backend == "iptables":
        return "DNAT" in daemon.run(["ip6tables", "-S", "OUTPUT"]).stdout
    return "ct status dnat accept" in daemon.run(["nft", "list", "chain", "inet", "firewalld", "filter_OUTPUT"]).stdout
