"""What `explain` lists of a host beside tpctl's rules: routing rules, reverse path filters, nat chains of others."""

from __future__ import annotations

import pytest

from tests.netns.arrival.test_foreign_filters import redirecting
from tests.netns.lab import run, tpctl
from tpctl.arrival import beside
from tpctl.host import rules
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

RULES = (
    "from all fwmark 0x80000/0xff0000 lookup 52",
    "not from all fwmark 0xca6c lookup 51820",
    "from all uidrange 10-20 lookup 77",
    "from all lookup main suppress_prefixlength 0",
    "from {net} iif eth0 prohibit",
    "from all to {net} oif eth0 lookup default",
    "from all lookup 52",
)


@pytest.mark.parametrize("family", Family)
def test_routing_rules_are_listed_as_ip_rule_shows_them(family: Family) -> None:
    flag, net = ("-4", "192.0.2.0/24") if family is Family.IPV4 else ("-6", "2001:db8::/32")
    with redirecting() as lab, lab.inside(HOST):
        before = rules.listed(family)
        for number, rule in enumerate(RULES, 100):
            run(["ip", flag, "rule", "add", *rule.format(net=net).split(), "priority", str(number)])
        listed = rules.listed(family)
        shown = [" ".join(line.split()) for line in run(["ip", flag, "rule", "show"]).stdout.splitlines()]
    assert before == ()
    assert [line for line in shown if line in listed] == list(listed)
    assert len(listed) == len(RULES)


def told(*words: str, engine: str = "nftables") -> str:
    asked = ("explain", *words, "--kuma-dp-user", "nobody", "--engine", engine)
    return tpctl(*asked).stdout.partition("on this host:")[2]


def test_what_stands_beside_a_connection() -> None:
    with redirecting() as lab, lab.inside(HOST):
        link = lab.layout.uplinks[0].name
        run(["ip", "rule", "add", "fwmark", "9", "lookup", "99", "priority", "50"])
        run(["ip", "link", "add", "quiet", "type", "veth", "peer", "name", "far"])
        run(["ip", "link", "set", "quiet", "up"])
        run(["ip", "link", "set", "far", "up"])
        run(["ip", "route", "add", "203.0.113.0/24", "dev", "quiet"])
        run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{link}.rp_filter=1"])
        run(["nft", "-f", "-"], stdin="add table ip a; add chain ip a out { type nat hook output priority -150; }; "
            "add rule ip a out tcp dport 1 dnat to 192.0.2.1; add chain ip a in { type nat hook prerouting priority 0; "
            "}; add rule ip a in tcp dport 1 dnat to 192.0.2.1;")  # fmt: skip
        assert beside.reverse_path_filter(link) == 1
        outbound = told("outbound", "--uid", "1000", "--to", "198.51.100.7:443")
        assert "ip rule 50: from all fwmark 0x9 lookup 99" in outbound
        assert "reverse path filter of lo: off (rp_filter 0)" in outbound
        assert "nat chain ip a out (1 rule, priority -150) is asked before tpctl's rules (priority -99)" in outbound
        for source, more in (
            ("203.0.113.9", "; it drops the connection, because the route to"),
            ("198.51.100.7", "\n"),
        ):
            inbound = told("inbound", "--from", source, "--to", f"{HOST_ADDRESS[Family.IPV4]}:80", "--interface", link)
            assert f"reverse path filter of {link}: strict (rp_filter 1){more}" in inbound
            assert "nat chain ip a in (1 rule, priority 0) is asked after tpctl's rules (priority -98)" in inbound
        assert "is asked after tpctl's programs" in told(
            "outbound", "--uid", "1000", "--to", "198.51.100.7:443", engine="ebpf"
        )
        assert "ip rule" not in told("outbound", "--uid", "1000", "--to", "[2001:db8:51::7]:443")
