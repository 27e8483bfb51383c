"""Beside the rules of others: they act as they did, and are left exactly as they were."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.lab import APP, PROXY, bare_namespace, run, snapshot, unprivileged
from tpctl.change import loopback
from tpctl.engines.nftables.engine import NftablesEngine, load
from tpctl.engines.nftables.probe import EVERYTHING
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, stage
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.rehearse import attempt
from tpctl.rehearsal.sockets import Seat
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, PortRange, Protocol
from tpctl.system.errors import ApplyError

pytestmark = pytest.mark.root

FOREIGN = """
table inet tpctl_not_ours {
    set blocked { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 }; }
    counter seen { packets 7 bytes 777; }
    map ports { type inet_service : inet_service; elements = { 80 : 8080 }; }
    chain output { type nat hook output priority -100; policy accept; ip daddr @blocked counter packets 5 bytes 55; }
    chain prerouting {
        type nat hook prerouting priority -99; policy accept;
        meta l4proto tcp counter name seen redirect to tcp dport map @ports
    }
}
table ip tpctl { chain nobody { counter packets 3 bytes 33 accept; }; }
"""
IPTABLES = """*nat
-A PREROUTING -p tcp --dport 99 -m comment --comment "tpctl/ but not ours" -j REDIRECT --to-ports 100
-A OUTPUT -d 192.0.2.1/32 -j RETURN
COMMIT
*raw
-A OUTPUT -p udp -j ACCEPT
COMMIT
"""
LISTED = Policy(PROXY, dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("9.9.9.9")),)))


@contextlib.contextmanager
def lab_with(policy: Policy) -> Iterator[tuple[Lab, NftablesEngine]]:
    """A laboratory whose host has `policy` installed, and a data plane."""
    with Lab(stage(policy).layout) as lab:
        with lab.inside(HOST):
            engine = load()
            loopback.add(policy.loopback)
            engine.apply(engine.plan(policy))
        lab.serve_data_plane(policy)
        yield lab, engine


def foreign(variant: str) -> None:
    """Rules of other software in the current namespace."""
    run(["nft", "-f", "-"], stdin=FOREIGN)
    for tool in (f"iptables-{variant}-restore", f"ip6tables-{variant}-restore"):
        text = IPTABLES if tool.startswith("iptables") else IPTABLES.replace("192.0.2.1/32", "2001:db8::1/128")
        run([tool, "--noflush"], stdin=text)


def test_everything_of_others_is_as_before(variant: str) -> None:
    with bare_namespace() as space, space.inside():
        foreign(variant)
        before = snapshot(counters=True)
        listed = run(["nft", "list", "ruleset"]).stdout
        engine = load()
        for policy in (Policy(PROXY), EVERYTHING, LISTED):
            plan = engine.plan(policy)
            engine.apply(plan)
            assert engine.inspect(plan).drift == ()
            during = run(["nft", "list", "ruleset"]).stdout.partition("table inet tpctl {")[0]
            assert during == listed
        assert engine.remove().notices == ()
        assert snapshot(counters=True) == before


def seat_of(lab: Lab, connection: Connection) -> Seat | None:
    lab.serve(connection)
    return lab.dial(connection).seat


@pytest.mark.parametrize("insert", [False, True])
def test_rules_of_others_come_first_unless_ours_are_inserted(variant: str, insert: bool) -> None:
    """Whoever sets an address first has the connection; in which order the chains were made plays no part."""
    policy = Policy(PROXY, inbound=Inbound(insert=insert), outbound=Outbound(insert=insert))
    rules = "*nat\n" + "".join(
        f"-A {chain} -p tcp --dport 8080 -j REDIRECT --to-ports 4444\n" for chain in ("PREROUTING", "OUTPUT")
    )
    for theirs_first in (True, False):
        with Lab(stage(policy).layout) as lab:
            outgoing = lab.layout.outgoing(Protocol.TCP, ip_address("203.0.113.10"), 8080, APP)
            arriving = lab.layout.arriving(ip_address("203.0.113.10"), ip_address("198.19.255.2"), Protocol.TCP, 8080)
            with lab.inside(HOST):
                engine = load()
                loopback.add("lo")
                if theirs_first:
                    run([f"iptables-{variant}-restore"], stdin=rules + "COMMIT\n")
                engine.apply(engine.plan(policy))
                if not theirs_first:
                    run([f"iptables-{variant}-restore"], stdin=rules + "COMMIT\n")
            lab.serve_data_plane(policy)
            lab.listen(HOST, Protocol.TCP, 4444)
            expected = (15001, 15006) if insert else (4444, 4444)
            assert (seat_of(lab, outgoing), seat_of(lab, arriving)) == tuple(Seat(HOST, port) for port in expected)


def test_an_exclusion_does_not_keep_others_from_acting(variant: str) -> None:
    """As with Docker's address translation: what we pass, they still see."""
    policy = Policy(PROXY, outbound=Outbound(insert=True, exclude_destinations=(ip_network("203.0.113.0/24"),)))
    with lab_with(policy) as (lab, _):
        with lab.inside(HOST):
            rule = "-A OUTPUT -d 203.0.113.10/32 -p tcp -j DNAT --to-destination 198.51.100.10:9999\n"
            run([f"iptables-{variant}-restore"], stdin=f"*nat\n{rule}COMMIT\n")
        lab.serve(lab.layout.outgoing(Protocol.TCP, ip_address("198.51.100.10"), 9999, APP))
        dialled = lab.layout.outgoing(Protocol.TCP, ip_address("203.0.113.10"), 8080, APP)
        assert lab.dial(dialled).seat == Seat("peer", 9999)


def test_every_probe_holds_beside_the_rules_of_others(variant: str) -> None:
    policy = dataclasses.replace(EVERYTHING, log_level=None)
    staging = stage(policy)
    with Lab(staging.layout) as lab:
        with lab.inside(HOST):
            foreign(variant)
            engine = load()
            loopback.add("lo")
            engine.apply(engine.plan(staging.policy))
            run(["nft", "delete", "chain", "inet", "tpctl_not_ours", "prerouting"])
        lab.serve_data_plane(staging.policy)
        wrong = [
            result for result in attempt(lab, staging.policy, probes(staging.policy, staging.layout)) if not result.ok
        ]
        assert wrong == []


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("delete rule inet tpctl outbound handle {handle}", "-tcp dport @excluded_outbound_ports"),
        ("add element inet tpctl {ports} {{ 7777 }}", "7777"),
        ("insert rule inet tpctl output_last accept", "+accept"),
        ("add chain inet tpctl stranger", "+chain stranger"),
        ("replace rule inet tpctl outbound handle {handle} counter drop", "+counter"),
        ("add table inet tpctl {{ flags dormant; }}", "dormant"),
    ],
)  # fmt: skip
def test_drift_is_seen_and_put_right(change: str, shown: str) -> None:
    policy = Policy(PROXY, outbound=Outbound(exclude_ports=(PortRange(22), PortRange(80, 90))))
    with bare_namespace() as space, space.inside():
        engine = load()
        plan = engine.plan(policy)
        engine.apply(plan)
        assert engine.inspect(plan).drift == ()
        rules = (item["rule"] for item in engine.nft.objects("list table inet tpctl") if "rule" in item)
        handle = next(rule["handle"] for rule in rules if rule.get("comment") == "tpctl/o1: excluded ports")
        ports = next(item.name for item in plan.table.sets if item.type == "inet_service")
        run(["nft", "-f", "-"], stdin=change.format(handle=handle, ports=ports))
        drift = engine.inspect(plan).drift
        assert any(shown in line for line in drift), drift
        engine.apply(plan)
        assert engine.inspect(plan).drift == ()


def test_a_table_of_our_name_but_of_another_shape_is_replaced() -> None:
    with bare_namespace() as space, space.inside():
        run(
            ["nft", "-f", "-"],
            stdin="table inet tpctl { counter c { }; chain output_last { type filter hook input priority 0; drop; }; }",
        )
        engine = load()
        plan = engine.plan(Policy(PROXY))
        assert engine.apply(plan).replaced == ("tpctl's rules (nftables)",)
        assert engine.inspect(plan).drift == ()


def test_a_refused_transaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_namespace() as space, space.inside():
        engine = load()
        engine.apply(engine.plan(Policy(PROXY)))
        before = run(["nft", "list", "ruleset"]).stdout
        real = engine.nft.execute
        monkeypatch.setattr(engine.nft, "execute", lambda text: real(f"{text}add rule inet tpctl nowhere accept\n"))
        with pytest.raises(ApplyError, match="Nothing was changed"):
            engine.apply(engine.plan(EVERYTHING))
        assert run(["nft", "list", "ruleset"]).stdout == before


def test_counters_tell_which_rule_acted() -> None:
    with lab_with(Policy(PROXY)) as (lab, engine):
        seat_of(lab, lab.layout.outgoing(Protocol.TCP, ip_address("203.0.113.10"), 8080, APP))
        with lab.inside(HOST):
            counted = {counter.rule: counter.packets for counter in engine.inspect(None).counters}
    assert counted["tpctl/o7: everything else"] == 1
    assert counted["tpctl/i7: everything else"] == 0


def test_without_privilege_it_says_what_is_needed() -> None:
    done = unprivileged("from tpctl.engines.nftables.engine import load\nload()\n")
    assert "HostError: " in done.stderr
    assert "CAP_NET_ADMIN" in done.stderr
