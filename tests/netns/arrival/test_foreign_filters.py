"""Rules of others that end redirected connections: they are named, and what is advised makes the connection arrive."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.lab import APP, PROXY, run, tpctl
from tpctl.arrival import journey, notices, obstacles
from tpctl.arrival.obstacles import Obstacle
from tpctl.arrival.owners import Owner
from tpctl.change import loopback
from tpctl.engines import foreign_tables, registry
from tpctl.engines.foreign import Verdict
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout
from tpctl.spec.connection import Connection
from tpctl.spec.decide import decide
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy, PortRange

pytestmark = pytest.mark.root

LOST_SECONDS = 0.4
REMOTE = {Family.IPV4: ip_address("198.51.100.7"), Family.IPV6: ip_address("2001:db8:51::7")}
POLICY = Policy(PROXY)
NFT = ("sh", "-c", 'printf "%s\\n" "$1" | nft -f -', "sh")

UFW = """
{t} -N ufw{s}-before-input; {t} -N ufw{s}-user-input; {t} -A INPUT -j ufw{s}-before-input
{t} -A ufw{s}-before-input -i lo -j ACCEPT; {t} -A ufw{s}-before-input -p ipv6-icmp -j ACCEPT
{t} -A ufw{s}-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
{t} -A ufw{s}-before-input -j ufw{s}-user-input; {t} -A ufw{s}-user-input -p tcp -m tcp --dport 8080 -j ACCEPT
{t} -P INPUT DROP
"""
TAILSCALE = """
{t} -N ts-input; {t} -I INPUT -j ts-input
{t} -A ts-input -s {remote_net} ! -i {link} -j DROP
"""
WG_QUICK = "{t} -t raw -I PREROUTING ! -i {link} -d {own} -m addrtype ! --src-type LOCAL -m comment --comment " \
           "'wg-quick(8) rule for {link}' -j DROP"  # fmt: skip
EGRESS = """
{t} -A OUTPUT -o lo -j ACCEPT; {t} -A OUTPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
{t} -A OUTPUT -p ipv6-icmp -j ACCEPT; {t} -A OUTPUT -p tcp -m tcp --dport 443 -j ACCEPT; {t} -P OUTPUT DROP
"""
REJECTING = """
{t} -A INPUT -i lo -j ACCEPT; {t} -A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT
{t} -A INPUT -p tcp -m tcp --syn -j REJECT
"""
OF_IPTABLES = {
    "ufw": (UFW, "in", "ufw", "INPUT"),
    "tailscale": (TAILSCALE, "out", "tailscale", "ts-input"),
    "wg-quick": (WG_QUICK, "out", "wg-quick", "raw PREROUTING"),
    "an egress filter": (EGRESS, "out", "an administrator", "filter OUTPUT: policy DROP"),
    "a filter that rejects": (REJECTING, "in", "an administrator", "-j REJECT"),
}
NFT_INPUT = """table inet filter {{ chain input {{ type filter hook input priority 0; policy drop;
    ct state vmap {{ established : accept, invalid : drop }}; iifname "lo" accept; meta l4proto ipv6-icmp accept
    tcp dport {{ 22, 8080 }} accept; }}; }}"""
NFT_ANSWERS = """table inet site {{ chain pre {{ type filter hook prerouting priority raw;
    iifname != "{link}" {ip} daddr {own} fib saddr type != local drop; }}; }}"""
NFT_OUTPUT = """table inet filter {{ chain output {{ type filter hook output priority filter; policy drop;
    oifname "lo" accept; ct state established,related accept; meta l4proto ipv6-icmp accept
    tcp dport 443 accept; }}; }}"""
OF_NFT = {
    "a host's own input filter": (NFT_INPUT, "in", "inet filter input: policy drop"),
    "what wg-quick does": (NFT_ANSWERS, "out", "inet site pre: iifname != "),
    "a host's own output filter": (NFT_OUTPUT, "out", "inet filter output: policy drop"),
}  # fmt: skip


@contextlib.contextmanager
def redirecting(engine: str = "nftables", mode: str = "auto") -> Iterator[Lab]:
    """A laboratory with a data plane, on whose host everything is redirected."""
    with Lab(Layout()) as lab:
        with lab.inside(HOST):
            loopback.add(POLICY.loopback)
            chosen = registry.select(EngineOptions(engine=engine, iptables_mode=mode)).engine
            chosen.apply(chosen.plan(POLICY))
        lab.serve_data_plane(POLICY)
        yield lab


def connection(lab: Lab, way: str, family: Family) -> Connection:
    if way == "in":
        return lab.layout.arriving(REMOTE[family], HOST_ADDRESS[family], "tcp", 8080)
    return lab.layout.outgoing("tcp", REMOTE[family], 443, APP)


def expect_named(lab: Lab, way: str, family: Family, words: tuple[str, ...], engine: str = "nftables") -> Obstacle:
    """The connection is lost, that is foreseen and explained, and what is advised makes it arrive."""
    asked = connection(lab, way, family)
    assert lab.dial(asked, timeout=LOST_SECONDS).seat is None
    with lab.inside(HOST):
        lines = notices.problems(POLICY, engine)
        told = notices.on_this_host(POLICY, asked, decide(POLICY, asked), engine)
        found = obstacles.brought_about(foreign_tables.foreign_tables(), notices.trips(POLICY, engine))
    for word in words:
        assert word == str(Owner.ADMINISTRATOR) or any(word in line for line in lines), lines
        assert word == str(Owner.ADMINISTRATOR) or any(word in line for line in told), told
    mine = (one for one in found if all(word in f"{one.place.text} {one.owner}" for word in words))
    obstacle = next(one for one in mine if any(str(one.remedy) in line for line in told))
    assert obstacle.remedy
    return obstacle


def expect_arrival(lab: Lab, way: str, family: Family) -> None:
    assert str(lab.dial(connection(lab, way, family))) == ("host:15006" if way == "in" else "host:15001")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("name", OF_IPTABLES)
def test_rules_of_iptables(name: str, family: Family, variant: str) -> None:
    script, way, owner, place = OF_IPTABLES[name]
    with redirecting("iptables", variant) as lab:
        expect_arrival(lab, way, family)
        tool = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{variant}"
        text = script.format(
            t=tool, s="" if family is Family.IPV4 else "6", own=HOST_ADDRESS[family], link=lab.layout.uplinks[0].name,
            remote_net="198.51.100.0/24" if family is Family.IPV4 else "2001:db8:51::/48",
        )  # fmt: skip
        with lab.inside(HOST):
            run(["sh", "-ec", text])
        found = expect_named(lab, way, family, (owner, place, tool), "iptables")
        with lab.inside(HOST):
            # ufw is not at work here: its own words are tried on the real one elsewhere.
            run(
                shlex.split(found.remedy or "")
                if owner != "ufw"
                else [
                    tool,
                    "-I",
                    "ufw-user-input".replace("ufw", "ufw" if family is Family.IPV4 else "ufw6"),
                    "-p",
                    "tcp",
                    "--dport",
                    "15006",
                    "-j",
                    "ACCEPT",
                ]
            )
        expect_arrival(lab, way, family)
        with lab.inside(HOST):
            assert not notices.problems(POLICY, "iptables")
            chosen = registry.select(EngineOptions(engine="iptables", iptables_mode=variant)).engine
            assert not chosen.inspect(chosen.plan(POLICY)).drift, "what was advised comes before tpctl's own rules"


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("name", OF_NFT)
def test_rules_of_nft(name: str, family: Family) -> None:
    script, way, place = OF_NFT[name]
    with redirecting() as lab:
        ip = "ip" if family is Family.IPV4 else "ip6"
        text = script.format(ip=ip, own=HOST_ADDRESS[family], link=lab.layout.uplinks[0].name)
        with lab.inside(HOST):
            run(["nft", "-f", "-"], stdin=text)
        found = expect_named(lab, way, family, (place,))
        with lab.inside(HOST):
            run(["sh", "-c", found.remedy or ""])
        expect_arrival(lab, way, family)


def test_explain_ends_with_what_stands_beside_the_connection() -> None:
    """What drops it or its answers, translates it before, or marks it; and that there is none."""
    flags = ("--kuma-dp-user", "nobody", "--engine", "nftables")
    asked = ("explain", "outbound", "--uid", "1000", "--to", "198.51.100.7:443", *flags)
    with redirecting() as lab, lab.inside(HOST):
        assert "no rule of other software" in tpctl(*asked).stdout.partition("on this host:")[2]
        for words in (
            "-t mangle -A OUTPUT -p tcp --dport 443 -j MARK --set-mark 5",
            "-t nat -A OUTPUT -p tcp --dport 443 -j DNAT --to-destination 198.51.100.8",
            "-A INPUT -s 198.51.100.0/24 -i lo -j DROP",
        ):
            run(["iptables-nft", *words.split()])
        said = tpctl(*asked).stdout.partition("on this host:")[2]
        assert "mangle OUTPUT: -p tcp -m tcp --dport 443 -j MARK" in said
        assert "nat OUTPUT: -p tcp -m tcp --dport 443 -j DNAT" in said
        assert "drops an answer of the data plane at input; to let it pass: iptables-nft -I INPUT -i lo" in said
        beside = json.loads(tpctl(*asked, "--json").stdout)["onThisHost"]
        assert len(beside) == len(said.strip().splitlines())


UNTRACKED = {
    "what leaves": ("out", "-t raw -A OUTPUT -p tcp --dport 443 -j {target}"),
    "answers over lo": ("out", "-t raw -A OUTPUT -o lo -j {target}"),
    "what arrives": ("in", "-t raw -A PREROUTING -p tcp --dport 8080 -j {target}"),
    "answers to others": ("in", "-t raw -A OUTPUT -p tcp --sport 15006 -j {target}"),
}


@pytest.mark.parametrize("name", UNTRACKED)
def test_what_conntrack_does_not_see(name: str, variant: str) -> None:
    """It is not translated, and goes past the data plane; an answer is lost."""
    way, words = UNTRACKED[name]
    target = "NOTRACK" if variant == "legacy" else "CT --notrack"
    with redirecting("iptables", variant) as lab:
        expect_arrival(lab, way, Family.IPV4)
        with lab.inside(HOST):
            assert not notices.problems(POLICY, "iptables")
            run([f"iptables-{variant}", *words.format(target=target).split()])
        asked = connection(lab, way, Family.IPV4)
        assert str(lab.dial(asked, timeout=LOST_SECONDS)) not in ("host:15006", "host:15001")
        with lab.inside(HOST):
            (line,) = notices.problems(POLICY, "iptables")
            assert f"iptables-{variant} raw" in line
            assert "from conntrack" in line
            (told, *_) = notices.on_this_host(POLICY, asked, decide(POLICY, asked), "iptables")
            assert told.startswith(f"iptables-{variant} raw")
            assert notices.problems(POLICY, "ebpf") == ()
            (found,) = (
                one
                for one in obstacles.on_the_way(
                    foreign_tables.foreign_tables(),
                    journey.of_connection(asked, decide(POLICY, asked), "iptables", PROXY),
                    with_nat=False,
                )
                if one.verdict is Verdict.UNTRACK
            )
            run(shlex.split(found.remedy or ""))
        expect_arrival(lab, way, Family.IPV4)


@pytest.mark.parametrize(
    ("family", "rules", "count"),
    [
        ("ip", "masquerade", 1),
        ("ip6", "snat to fd00::5", 1),
        ("ip", 'oifname "eth0" masquerade', 0),
        ("ip", "ip saddr 172.17.0.0/16 snat to 10.0.0.5", 0),
        ("ip", "oif lo accept; masquerade", 0),
        ("ip6", "masquerade", 0),
    ],
)
def test_what_changes_the_source_by_which_ebpf_knows_a_connection(family: str, rules: str, count: int) -> None:
    """Netfilter's engines are asked by the source that the socket has, and do not mind."""
    with redirecting() as lab, lab.inside(HOST):
        chain = f"chain p {{ type nat hook postrouting priority 100; {rules}; }}"
        run(["nft", "-f", "-"], stdin=f"table {family} n {{ {chain}; }}")
        told = notices.problems(POLICY, "ebpf")
        assert len(told) == count
        assert all("changes the source address" in line for line in told)
        assert not notices.problems(POLICY, "nftables")


TRACKED_ALL_THE_SAME = """table inet site {
    chain out { type filter hook output priority raw
        tcp sport { 8080, 443 } notrack
        udp dport 53 notrack
        meta mark & 0xf00 == 0xa00 notrack
        ip daddr 192.0.2.0/24 tcp dport 5432 notrack
    }
    chain in { type filter hook prerouting priority raw
        iifname "lo" notrack
        tcp dport 22 notrack
    }
    chain late { type filter hook output priority -150; tcp dport 443 notrack; }
}"""


def test_nothing_is_said_of_untracked_connections_that_are_not_redirected() -> None:
    """Answers of applications, excluded ports and addresses, and what conntrack knows already."""
    policy = dataclasses.replace(
        POLICY,
        inbound=dataclasses.replace(POLICY.inbound, exclude_ports=(PortRange(22),)),
        outbound=dataclasses.replace(POLICY.outbound, exclude_destinations=(ip_network("192.0.2.0/24"),)),
    )
    with redirecting() as lab:
        with lab.inside(HOST):
            run(["nft", "-f", "-"], stdin=TRACKED_ALL_THE_SAME)
            assert notices.problems(policy, "nftables") == ()
            assert notices.problems(POLICY, "nftables") != ()
        expect_arrival(lab, "out", Family.IPV4)
        expect_arrival(lab, "in", Family.IPV4)


HARMLESS = (
    "table inet f { chain i { type filter hook input priority 0; policy drop; accept; }; }",
    "table inet f { chain i { type filter hook input priority 0; ct state invalid drop; ip saddr 192.0.2.0/24 drop; "
    "tcp dport 25 reject; limit rate over 1/second drop; }; }",
    "table inet f { set s { type ipv4_addr; elements = { 192.0.2.1 } }; chain o { type filter hook output priority 0; "
    "ip daddr @s drop; meta mark 0x8000 drop; oifname \"lo\" accept; reject; }; }",
    "table inet f { chain i { type filter hook input priority 0; policy drop; iifname \"lo\" accept; ct status dnat "
    "accept; ct state established accept; meta l4proto ipv6-icmp accept; }; }",
)  # fmt: skip


@pytest.mark.parametrize("rules", HARMLESS)
def test_nothing_is_said_of_rules_that_treat_them_as_before(rules: str) -> None:
    """What they drop they would have dropped without the redirect, or nobody can tell."""
    with redirecting() as lab, lab.inside(HOST):
        run(["nft", "-f", "-"], stdin=rules)
        assert notices.problems(POLICY, "nftables") == ()
