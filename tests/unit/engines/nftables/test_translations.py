"""Rules of nftables that translate, as rules of iptables that say the same."""

from __future__ import annotations

import pytest

from tpctl.engines.iptables import order
from tpctl.engines.iptables.meets import Judge
from tpctl.engines.nftables import listing, translations
from tpctl.spec.policy import Family, Inbound, Policy, PortRange

TABLE = """\
table {family} other {{
	map services {{
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = {{ 10.96.0.1 . tcp . 443 comment "a, b" : goto service, 10.96.0.2 . udp . 53 : goto service }}
	}}

	chain base {{
		type nat hook {hook} priority dstnat - 5; policy accept;
		{rule}
	}}

	chain service {{
		dnat ip to 172.17.0.2:80
	}}
}}
"""
JUDGE = Judge(Policy(5678, inbound=Inbound(exclude_ports=(PortRange(22),))), Family.IPV4)


def read(rule: str, hook: str, family: str) -> translations.Translations:
    (table,) = listing.read(TABLE.format(rule=rule, hook=hook, family=family))
    (found,) = translations.read(table)
    return found


def told(rule: str, hook: str, family: str = "inet") -> list[tuple[int | None, bool]]:
    """The port of the example for each rule that translates what the policy takes, and whether it stays here."""
    found = read(rule, hook, family)
    return [
        (each.met.destination_port, each.stays) for each in order.translating(found.table, found.hook, ["tcp"], JUDGE)
    ]


def test_the_place_of_a_chain() -> None:
    found = read("tcp dport 80 redirect to :8080", "prerouting", "ip")
    assert (found.where, found.hook, found.priority) == ("ip other base", "PREROUTING", -105)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("tcp dport 80 counter redirect to :8080", [(80, True)]),
        ("tcp dport { 22, 80 } counter redirect to :8080", [(80, True)]),
        ("tcp dport 22 redirect to :8080", []),
        ("tcp dport != 22 redirect to :8080", [(8080, True)]),
        ("udp dport 80 redirect to :8080", []),
        ("meta l4proto udp redirect to :8080", []),
        ('iifname "eth0" meta l4proto tcp ip saddr 198.51.100.0/24 tcp dport 81 redirect to :8080', [(81, True)]),
        ("ip daddr 198.51.100.1 tcp dport 81 redirect to :8080", []),
        ("ip6 daddr fd00::1 tcp dport 81 redirect to :8080", []),
        ("meta nfproto ipv6 tcp dport 81 redirect to :8080", []),
        ("ct state established tcp dport 81 redirect to :8080", []),
        ("fib daddr type local tcp dport 81 dnat ip to 172.17.0.2:80", [(81, False)]),
        ("fib daddr type local counter jump service", [(8080, False)]),
        ('tcp dport 81 accept comment "redirect to :1"', []),
    ],
)
def test_what_arrives(rule: str, expected: list[tuple[int, bool]]) -> None:
    assert told(rule, "prerouting") == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ('oifname != "lo" meta skuid 5678 tcp dport 81 redirect to :8080', []),
        ("meta skuid != 5678 tcp dport 81 redirect to :8080", [(81, True)]),
        ('oifname "lo" meta skuid != 5678 redirect to :8080', []),
        ("ip daddr . meta l4proto . th dport vmap @services", [(443, True)]),
        ("ip daddr . tcp dport vmap { 203.0.113.1 . 81 : jump service }", [(81, True)]),
    ],
)
def test_what_leaves(rule: str, expected: list[tuple[int, bool]]) -> None:
    assert told(rule, "output") == expected
