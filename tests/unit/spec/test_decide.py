"""The specification of TCP, rule by rule. Names are those of docs/ruleset.md."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest

from tests.unit.spec.asking import (
    APP,
    CAPTURED,
    DEFAULT,
    EXCLUDE_APP,
    LOCAL,
    OWN,
    PASS_SOURCE,
    PDNS,
    PIN,
    POUT,
    PROXY,
    REMOTE,
    ROOT,
    SERVER,
    SERVICE,
    UPSTREAM,
    VNETS,
    arrives,
    both_families,
    capture_all,
    goes_to,
    listed,
    out,
    passes,
    policy,
    query,
    verdict,
    zone,
)
from tpctl.spec.connection import State
from tpctl.spec.decide import decide
from tpctl.spec.policy import (
    ALL_PORTS,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    Outbound,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
)
from tpctl.spec.verdict import Action


@both_families
def test_matrix_of_the_default_install(v: int) -> None:
    """docs/ruleset.md §4, row by row."""
    own, remote, local = OWN[v], REMOTE[v], LOCAL[v]
    rows = [
        (DEFAULT, arrives(own), goes_to(PIN, "i7")),
        (DEFAULT, arrives(own, protocol="udp"), passes("p2")),
        (DEFAULT, out(remote), goes_to(POUT, "o7")),
        (DEFAULT, out(remote, uid=ROOT), goes_to(POUT, "o7")),
        (DEFAULT, out(local), passes("o4")),
        (DEFAULT, out(own), passes("o4")),
        (DEFAULT, out(remote, uid=PROXY), passes("o5")),
        (DEFAULT, out(local, uid=PROXY), passes("o5")),
        (DEFAULT, out(own, uid=PROXY), goes_to(PIN, "i7")),
        (DEFAULT, out(own, uid=PROXY, source=ip_address(PASS_SOURCE[v])), passes("o2")),
        (DEFAULT, out(local, uid=PROXY, source=ip_address(PASS_SOURCE[v])), passes("o2")),
        (DEFAULT, out(remote, 443, protocol="udp"), passes("d0")),
        (DEFAULT, out(SERVER[v], 53), goes_to(POUT, "o7")),
        (listed(), out(SERVER[v], 53), passes("x4")),
    ]
    for asked, connection, expected in rows:
        assert verdict(asked, connection) == expected, connection


def test_matrix_the_rest_of_127_8() -> None:
    assert verdict(DEFAULT, out("127.0.0.2")) == passes("o4")
    assert verdict(DEFAULT, out("127.0.0.2", uid=PROXY)) == goes_to(PIN, "i7")


def test_f1_a_family_that_is_left_alone() -> None:
    asked = policy(families=frozenset({Family.IPV4}), drop_invalid=True)
    for connection in (arrives(OWN[6]), out(REMOTE[6]), query(SERVER[6]), arrives(OWN[6], state=State.INVALID)):
        assert verdict(asked, connection) == passes("f1")
    assert decide(dataclasses.replace(asked, dns=Dns(DnsCapture.ALL)), query(SERVER[6])).zone == 0


@both_families
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_i1_invalid_packets(v: int, protocol: str) -> None:
    connection = arrives(OWN[v], protocol=protocol, state=State.INVALID)
    assert verdict(policy(drop_invalid=True), connection) == ("i1", Action.DROP, None)
    assert verdict(DEFAULT, connection) == passes("n1")
    assert verdict(policy(drop_invalid=True), out(REMOTE[v], state=State.INVALID)) == passes("n1")


@pytest.mark.parametrize("state", [State.MIDSTREAM, State.ESTABLISHED])
def test_n1_running_connections_are_left_alone(state: State) -> None:
    """Defect 2: kumactl resets them when conntrack was idle."""
    assert verdict(DEFAULT, arrives(OWN[4], state=state)) == passes("n1")
    assert verdict(DEFAULT, out(REMOTE[4], state=state)) == passes("n1")


@pytest.mark.parametrize("protocol", ["icmp", "sctp"])
def test_p1_other_protocols(protocol: str) -> None:
    assert verdict(DEFAULT, arrives(OWN[4], None, protocol=protocol)) == passes("p1")
    assert verdict(DEFAULT, out(REMOTE[4], None, protocol=protocol)) == passes("p1")


@pytest.mark.parametrize("where", [None, "", "system.slice", "system.slice/app.service2", "user.slice/app.service"])
@both_families
def test_c1_outside_the_cgroup_nothing_that_is_opened_is_redirected(v: int, where: str | None) -> None:
    asked = dataclasses.replace(capture_all(), cgroup=SERVICE)
    for connection in (out(REMOTE[v]), query(SERVER[v]), out(OWN[v], uid=PROXY)):
        outside = dataclasses.replace(connection, cgroup=where)
        assert verdict(asked, outside) == ("c1", Action.PASS, None)
    assert zone(asked, dataclasses.replace(query(SERVER[v]), cgroup=where)) == UPSTREAM
    assert verdict(asked, arrives(OWN[v]))[0] == "i7"


@pytest.mark.parametrize("where", ["system.slice/app.service", "system.slice/app.service/worker"])
@both_families
def test_c1_inside_the_cgroup_and_below_it_the_other_rules_are_asked(v: int, where: str) -> None:
    asked = dataclasses.replace(capture_all(), cgroup=SERVICE)
    assert verdict(asked, out(REMOTE[v], cgroup=where))[0] == "o7"
    assert verdict(asked, query(SERVER[v], cgroup=where))[0] == "d3"
    assert zone(asked, query(SERVER[v], cgroup=where)) == CAPTURED


@pytest.mark.parametrize(("interface", "inside", "v"), [("docker0", "172.17.0.9", 4), ("br-7", "fd17::9", 6)])
def test_i2_virtual_networks(interface: str, inside: str, v: int) -> None:
    asked = policy(
        virtual_networks=VNETS, inbound=Inbound(enabled=False), outbound=Outbound(exclude_ports=(ALL_PORTS,))
    )
    leaves = arrives(REMOTE[v], 443, inside, interface=interface, local_destination=False)
    assert verdict(asked, leaves) == goes_to(POUT, "i2")
    other_own = dataclasses.replace(leaves, destination=ip_address(OWN[v]), local_destination=True)
    assert verdict(asked, other_own) == goes_to(POUT, "i2")
    assert verdict(asked, dataclasses.replace(leaves, destination=ip_address(inside))) == passes("i0")
    assert verdict(asked, dataclasses.replace(leaves, interface="eth0")) == passes("i0")
    own_of_bridge = dataclasses.replace(leaves, destination=ip_address(inside), local_destination=True)
    assert verdict(policy(virtual_networks=VNETS), own_of_bridge) == goes_to(PIN, "i7")


@pytest.mark.parametrize(("interface", "inside", "v"), [("docker0", "172.17.0.9", 4), ("br-7", "fd17::9", 6)])
def test_v1_v3_dns_of_virtual_networks(interface: str, inside: str, v: int) -> None:
    over_udp = arrives(REMOTE[v], 53, inside, interface=interface, protocol="udp", local_destination=False)
    over_tcp = dataclasses.replace(over_udp, protocol="tcp")
    off = policy(virtual_networks=VNETS)
    assert verdict(off, over_udp) == goes_to(PDNS, "v1")
    assert verdict(off, dataclasses.replace(over_udp, destination_port=54)) == passes("p2")
    assert verdict(off, dataclasses.replace(over_udp, interface="eth0")) == passes("p2")
    assert verdict(off, over_tcp) == goes_to(POUT, "i2")
    assert verdict(policy(virtual_networks=VNETS, dns=Dns(tcp=True)), over_tcp) == goes_to(PDNS, "v3")


def test_defect_4_i0_forwarded_traffic_is_left_alone() -> None:
    assert verdict(DEFAULT, arrives(REMOTE[4], source="10.9.9.9", local_destination=False)) == passes("i0")


@both_families
def test_i3_inbound_off(v: int) -> None:
    assert verdict(policy(inbound=Inbound(enabled=False)), arrives(OWN[v])) == passes("i3")


@both_families
def test_i4_excluded_sources(v: int) -> None:
    sources = (ip_network("198.51.100.0/24"), ip_network("fd01::/16"))
    asked = policy(inbound=Inbound(exclude_sources=sources, include_ports=(PortRange(8080),)))
    assert verdict(asked, arrives(OWN[v])) == passes("i4")
    assert verdict(asked, arrives(OWN[v], source=OWN[v])) == goes_to(PIN, "i5")


def test_i5_included_ports_beat_excluded_ones() -> None:
    asked = policy(inbound=Inbound(include_ports=(PortRange(8000, 8099),), exclude_ports=(PortRange(8080),)))
    assert verdict(asked, arrives(OWN[4], 8080)) == goes_to(PIN, "i5")
    assert verdict(asked, arrives(OWN[4], 8100)) == passes("i5")


def test_i6_excluded_ports() -> None:
    asked = policy(inbound=Inbound(port=16006, exclude_ports=(PortRange(22), PortRange(8000, 8100))))
    assert verdict(asked, arrives(OWN[4], 22)) == passes("i6")
    assert verdict(asked, arrives(OWN[4], 8100)) == passes("i6")
    assert verdict(asked, arrives(OWN[4], 23)) == goes_to(16006, "i7")


def test_i7_ssh_is_nothing_special_nor_are_the_listeners_ports_without_the_guard() -> None:
    assert verdict(DEFAULT, arrives(OWN[4], 22)) == goes_to(PIN, "i7")
    for port in (PIN, POUT):
        assert verdict(policy(guard_ports=False), arrives(OWN[4], port)) == goes_to(PIN, "i7")


def test_x1_excluded_uids() -> None:
    asked = policy(outbound=Outbound(exclude_uids=EXCLUDE_APP))
    assert verdict(asked, out(REMOTE[4], 85)) == passes("x1")
    assert verdict(asked, out(REMOTE[4], 85, 1001)) == passes("x1")
    for other in (out(REMOTE[4], 91), out(REMOTE[4], 85, 1002), out(REMOTE[4], 85, None)):
        assert verdict(asked, other) == goes_to(POUT, "o7")


def test_x1_counts_its_protocol_only() -> None:
    asked = dataclasses.replace(
        capture_all(), outbound=Outbound(exclude_uids=(UidExclusion(Protocol.UDP, (ALL_PORTS,), UidRange(APP)),))
    )
    assert verdict(asked, query(SERVER[4])) == passes("x1")
    assert verdict(asked, out(REMOTE[4])) == goes_to(POUT, "o7")


@both_families
def test_x2_excluded_destinations(v: int) -> None:
    destinations = (ip_network("198.51.100.0/24"), ip_network("fd01::/16"))
    asked = policy(outbound=Outbound(exclude_destinations=destinations, include_ports=(PortRange(80),)))
    assert verdict(asked, out(REMOTE[v])) == passes("x2")
    assert verdict(asked, out(SERVER[v])) == goes_to(POUT, "o7")


@both_families
def test_x4_dns_over_tcp_passes_while_dns_is_on(v: int) -> None:
    for asked in (listed(), capture_all()):
        assert verdict(asked, out(REMOTE[v], 53)) == passes("x4")
        assert verdict(asked, out(REMOTE[v], 53, PROXY)) == passes("o5")
        assert verdict(asked, out(REMOTE[v], 53, None)) == passes("x4")


@pytest.mark.parametrize("insert", [True, False])
def test_defect_9_x4_holds_in_insert_mode(insert: bool) -> None:
    asked = dataclasses.replace(capture_all(), outbound=Outbound(insert=insert))
    assert verdict(asked, out(REMOTE[4], 53)) == passes("x4")


def test_x4_needs_a_server_of_the_family() -> None:
    assert verdict(listed(SERVER[4]), out(REMOTE[6], 53)) == goes_to(POUT, "o7")


@both_families
def test_d4_dns_over_tcp_redirected_on_demand(v: int) -> None:
    assert verdict(listed(tcp=True), out(SERVER[v], 53)) == goes_to(PDNS, "d4")
    assert verdict(listed(tcp=True), out(REMOTE[v], 53)) == passes("x4")
    assert verdict(capture_all(tcp=True), out(REMOTE[v], 53)) == goes_to(PDNS, "d4")
    assert verdict(capture_all(tcp=True), out(REMOTE[v], 53, PROXY)) == passes("o5")
    assert verdict(policy(dns=Dns(tcp=True)), out(REMOTE[v], 53)) == goes_to(POUT, "o7")


def test_o0_outbound_off() -> None:
    asked = policy(outbound=Outbound(enabled=False))
    assert verdict(asked, out(REMOTE[4])) == passes("o0")
    assert verdict(asked, out(OWN[4], uid=PROXY)) == passes("o0")
    still_dns = dataclasses.replace(capture_all(), outbound=Outbound(enabled=False))
    assert verdict(still_dns, query(SERVER[4])) == goes_to(PDNS, "d3")


def test_o1_excluded_ports_come_first() -> None:
    asked = policy(outbound=Outbound(exclude_ports=(PortRange(80),)))
    assert verdict(asked, out(REMOTE[4])) == passes("o1")
    assert verdict(asked, out(OWN[4], uid=PROXY)) == passes("o1")
    included = policy(outbound=Outbound(exclude_ports=(PortRange(80),), include_ports=(PortRange(80),)))
    assert verdict(included, out(REMOTE[4])) == goes_to(POUT, "o7")


@both_families
def test_o2_only_over_loopback(v: int) -> None:
    source = ip_address(PASS_SOURCE[v])
    assert verdict(DEFAULT, out(OWN[v], uid=PROXY, source=source)) == passes("o2")
    assert verdict(DEFAULT, out(REMOTE[v], source=source)) == goes_to(POUT, "o7")


@both_families
def test_defect_17_o3_self_calls_obey_the_inbound_rules(v: int) -> None:
    call = out(OWN[v], 8080, PROXY)
    for inbound, rule in (
        (Inbound(enabled=False), "i3"),
        (Inbound(exclude_sources=(ip_network(OWN[v]),)), "i4"),
        (Inbound(include_ports=(PortRange(80),)), "i5"),
        (Inbound(exclude_ports=(PortRange(8080),)), "i6"),
    ):
        answer = decide(policy(inbound=inbound), call)
        assert (answer.action, answer.rule) == (Action.PASS, "o5")
        assert rule in [step.rule for step in answer.steps if step.applied]


def test_o4_needs_another_owner_and_loopback() -> None:
    assert verdict(DEFAULT, out(OWN[4], uid=None)) == passes("o4")
    assert verdict(policy(loopback="loop"), out(OWN[4])) == goes_to(POUT, "o7")
    assert verdict(policy(loopback="loop"), out(OWN[4], interface="loop")) == passes("o4")


@both_families
def test_o6_loopback_address_without_loopback_interface(v: int) -> None:
    assert verdict(DEFAULT, out(LOCAL[v], uid=None, interface="eth0")) == passes("o6")


def test_o7_included_ports() -> None:
    asked = policy(outbound=Outbound(port=16001, include_ports=(PortRange(80, 90),)))
    assert verdict(asked, out(REMOTE[4], 90)) == goes_to(16001, "o7")
    assert verdict(asked, out(REMOTE[4], 91)) == passes("o7")
