"""A ban of an application's port does not hold behind a redirect: that is said, and what is advised holds."""

from __future__ import annotations

import json

import pytest

from tests.netns.arrival.test_foreign_filters import LOST_SECONDS, POLICY, REMOTE, connection, redirecting
from tests.netns.lab import PROXY, PROXY_USER, installed, run, tpctl
from tpctl.arrival import bans, notices
from tpctl.engines import foreign_tables
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout
from tpctl.spec.policy import Family, Inbound, Policy, PortRange, Redirection

pytestmark = pytest.mark.root

BANNED = str(REMOTE[Family.IPV4])
FAIL2BAN = """
{t} -N f2b-app; {t} -A f2b-app -s {banned}/32 -j REJECT; {t} -A f2b-app -j RETURN
{t} -I INPUT -p tcp -m multiport --dports 80,8080 -j f2b-app
"""
FAIL2BAN_NFT = """
nft 'add table inet f2b-table; add set inet f2b-table addr-set-app {{ type ipv4_addr; }}'
nft 'add chain inet f2b-table f2b-chain {{ type filter hook input priority -1; }}'
nft 'add rule inet f2b-table f2b-chain tcp dport {{ 80, 8080 }} ip saddr @addr-set-app reject'
nft 'add element inet f2b-table addr-set-app {{ {banned} }}'
"""
FIREWALL = "{t} -A INPUT -s {banned} -p tcp -m tcp --dport 8080 -j DROP"
FIREWALL_NFT = """
nft 'add table inet filter; add chain inet filter input {{ type filter hook input priority 0; }}'
nft 'add rule inet filter input ip saddr {banned} tcp dport 8080 drop'
"""
BYPASSED = {
    "fail2ban, iptables": (FAIL2BAN, "fail2ban", "filter INPUT: -p tcp -m multiport --dports 80,8080 -j f2b-app"),
    "fail2ban, nftables": (FAIL2BAN_NFT, "fail2ban", "inet f2b-table f2b-chain: tcp dport { 80, 8080 } ip saddr"),
    "a firewall, iptables": (FIREWALL, "firewall", "filter INPUT: -s 198.51.100.7/32 -p tcp -m tcp --dport 8080"),
    "a firewall, nftables": (FIREWALL_NFT, "firewall", "inet filter input: ip saddr 198.51.100.7 tcp dport 8080 drop"),
}  # fmt: skip
HOLDING = {
    "every port": "{t} -I INPUT -s {banned} -p tcp -j REJECT",
    "before the redirect": "{t} -t raw -I PREROUTING -s {banned} -p tcp --dport 8080 -j DROP",
    "the original port": "{t} -I INPUT -s {banned} -p tcp -m conntrack --ctorigdstport 8080 -j DROP",
    "every port, nft": FIREWALL_NFT.replace("tcp dport 8080", "meta l4proto tcp"),
    "before the redirect, nft": FIREWALL_NFT.replace("hook input priority 0", "hook prerouting priority -300"),
    "the original port, nft": FIREWALL_NFT.replace("tcp dport 8080", "meta l4proto tcp ct original proto-dst 8080"),
}


@pytest.mark.parametrize("name", BYPASSED)
def test_a_ban_that_is_bypassed_is_named(name: str, variant: str) -> None:
    script, whose, rule = BYPASSED[name]
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["sh", "-ec", script.format(t=f"iptables-{variant}", banned=BANNED)])
            (line,) = notices.bypasses(POLICY, "nftables")
            excluding = Policy(PROXY, inbound=Inbound(exclude_ports=(PortRange(80), PortRange(8080))))
            others = (
                excluding,
                Policy(PROXY, inbound=Inbound(mode=Redirection.TPROXY)),
                Policy(PROXY, inbound=Inbound(enabled=False)),
            )
            assert [bans.bypassed(foreign_tables.foreign_tables(), one) for one in others] == [(), (), ()]
            assert not notices.bypasses(POLICY, "ebpf")
        assert whose in line
        assert rule in line
        assert str(lab.dial(connection(lab, "in", Family.IPV4))) == "host:15006"


@pytest.mark.parametrize("name", HOLDING)
def test_a_ban_that_holds(name: str, variant: str) -> None:
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["sh", "-ec", HOLDING[name].format(t=f"iptables-{variant}", banned=BANNED)])
            assert not notices.bypasses(POLICY, "nftables")
        assert lab.dial(connection(lab, "in", Family.IPV4), timeout=LOST_SECONDS).seat is None


def test_a_rule_for_loopback_or_another_protocol_is_no_ban() -> None:
    rules = ("-i lo -p tcp --dport 8080 -j DROP", "-p udp --dport 8080 -j DROP", "-p tcp --dport 8080 -j ACCEPT")
    with redirecting() as lab, lab.inside(HOST):
        for rule in rules:
            run(["iptables-nft", "-A", "INPUT", *rule.split()])
        assert not notices.bypasses(POLICY, "nftables")


def test_a_ban_that_comes_after_the_install_is_told_by_status() -> None:
    """fail2ban makes its rules with the first ban."""
    with Lab(Layout()) as lab, installed(lab, "--kuma-dp-user", PROXY_USER), lab.inside(HOST):
        assert "fail2ban" not in tpctl("status", "--json", check=False).stdout
        run(["sh", "-ec", FAIL2BAN_NFT.format(banned=BANNED)])
        found = json.loads(tpctl("status", "--json", check=False).stdout)
        assert any("fail2ban does not refuse redirected connections" in warning for warning in found["warnings"])
        assert not any("fail2ban" in problem for problem in found["problems"])
