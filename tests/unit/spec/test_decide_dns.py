"""The specification of DNS and of conntrack's zones, rule by rule. Names are those of docs/ruleset.md."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest

from tests.unit.spec.asking import (
    APP,
    CAPTURED,
    DEFAULT,
    LOCAL,
    OWN,
    PDNS,
    PROXY,
    REMOTE,
    SERVER,
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
from tpctl.spec.policy import (
    DNS_PORT,
    Family,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    WhenProxyDown,
)


@both_families
def test_d1_exclusions_cover_dns(v: int) -> None:
    by_uid = Outbound(exclude_uids=(UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(APP)),))
    by_address = Outbound(exclude_destinations=(ip_network(SERVER[v]),))
    for asked in (listed(), capture_all()):
        assert verdict(dataclasses.replace(asked, outbound=by_uid), query(SERVER[v])) == passes("x1")
        assert verdict(dataclasses.replace(asked, outbound=by_address), query(SERVER[v])) == passes("x2")


@both_families
def test_d2_the_data_planes_own_queries(v: int) -> None:
    assert verdict(listed(), query(SERVER[v], PROXY)) == passes("d2")
    assert verdict(capture_all(), query(REMOTE[v], PROXY)) == passes("d2")


@both_families
def test_d3_captured_queries(v: int) -> None:
    assert verdict(listed(), query(SERVER[v])) == goes_to(PDNS, "d3")
    assert verdict(listed(port=5), query(SERVER[v], None)) == goes_to(5, "d3")
    assert verdict(capture_all(), query(REMOTE[v])) == goes_to(PDNS, "d3")
    assert verdict(listed(LOCAL[v]), query(LOCAL[v])) == goes_to(PDNS, "d3")


def test_defect_11_scoped_servers_capture_nothing() -> None:
    asked = listed("fe80::1%eth0")
    assert verdict(asked, query("fe80::1")) == passes("s1")
    assert verdict(asked, query(SERVER[6])) == passes("d0")
    assert not asked.captures_dns(Family.IPV6)


def test_b1_while_the_data_plane_does_not_listen() -> None:
    bypassing = Policy(PROXY, when_proxy_down=WhenProxyDown.BYPASS)
    deaf = dataclasses.replace(out(REMOTE[4], 443), data_plane_listens=False)
    assert verdict(bypassing, deaf) == passes("b1")
    assert verdict(bypassing, dataclasses.replace(deaf, data_plane_listens=True)) == goes_to(15001, "o7")
    assert verdict(Policy(PROXY), deaf) == goes_to(15001, "o7")


def test_s1_link_local_destinations_pass() -> None:
    assert verdict(capture_all(), query("fe80::1")) == passes("s1")
    assert verdict(Policy(PROXY), out("fe80::1", 443)) == passes("s1")


def test_d0_everything_else_over_udp() -> None:
    assert verdict(listed(), query(REMOTE[4])) == passes("d0")
    assert verdict(listed(), out(SERVER[4], 5353, protocol="udp")) == passes("d0")
    assert verdict(capture_all(), out(SERVER[4], 853, protocol="udp")) == passes("d0")
    assert verdict(DEFAULT, query(SERVER[4])) == passes("d0")


@both_families
def test_z1_upstream_queries(v: int) -> None:
    assert zone(capture_all(), query(REMOTE[v], PROXY)) == UPSTREAM
    assert zone(listed(), query(SERVER[v], PROXY)) == UPSTREAM


@both_families
def test_z2_answers_of_the_data_plane(v: int) -> None:
    for asked in (capture_all(), listed()):
        answer = out(OWN[v], 40000, PROXY, protocol="udp", source_port=PDNS)
        assert zone(asked, answer) == CAPTURED
        assert zone(asked, dataclasses.replace(answer, uid=APP)) == 0


@both_families
def test_z8_queries_to_the_listener_itself(v: int) -> None:
    for asked in (capture_all(), listed()):
        for uid in (PROXY, APP):
            own = out(LOCAL[v], PDNS, uid, protocol="udp", interface="lo")
            assert zone(asked, own) == CAPTURED
            assert zone(asked, dataclasses.replace(own, interface="eth0", destination=ip_address(REMOTE[v]))) == 0
    on_53 = listed(port=DNS_PORT)
    assert zone(on_53, out(LOCAL[v], DNS_PORT, PROXY, protocol="udp", interface="lo")) == 0


@both_families
def test_z3_captured_queries(v: int) -> None:
    assert zone(capture_all(), query(REMOTE[v])) == CAPTURED
    assert zone(listed(), query(SERVER[v])) == CAPTURED
    assert zone(listed(), query(REMOTE[v])) == 0
    local = LOCAL[v] if v == 6 else "127.0.0.53"
    reply = out(LOCAL[v], 40000, 101, protocol="udp", source=ip_address(local), source_port=53)
    assert zone(listed(local), reply) == UPSTREAM
    assert zone(listed(SERVER[v]), reply) == 0


@both_families
def test_z4_answers_from_upstream(v: int) -> None:
    answer = arrives(OWN[v], 40000, SERVER[v], protocol="udp", source_port=53)
    assert zone(listed(), answer) == UPSTREAM
    assert zone(capture_all(), answer) == UPSTREAM
    assert zone(listed(), dataclasses.replace(answer, source=ip_address(REMOTE[v]))) == 0
    assert zone(listed(), dataclasses.replace(answer, source_port=54)) == 0


def test_z4_scoped_server() -> None:
    answer = arrives(OWN[6], 40000, "fe80::1", protocol="udp", source_port=53)
    assert zone(listed("fe80::1%eth0"), answer) == 0
    assert zone(capture_all(), answer) == 0


@both_families
def test_z5_excluded_queries_leave_in_the_zone_their_answers_come_back_in(v: int) -> None:
    by_uid = Outbound(exclude_uids=(UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(APP)),))
    by_address = Outbound(exclude_destinations=(ip_network(SERVER[v]),))
    for outbound in (by_uid, by_address):
        for asked in (listed(), capture_all()):
            assert zone(dataclasses.replace(asked, outbound=outbound), query(SERVER[v])) == UPSTREAM


@pytest.mark.parametrize(("interface", "inside", "v"), [("docker0", "172.17.0.9", 4), ("br-7", "fd17::9", 6)])
def test_defect_8_z6_queries_of_virtual_networks(interface: str, inside: str, v: int) -> None:
    asked = dataclasses.replace(listed(), virtual_networks=VNETS)
    connection = arrives(SERVER[v], 53, inside, protocol="udp", interface=interface, local_destination=False)
    assert zone(asked, connection) == CAPTURED
    assert zone(policy(virtual_networks=VNETS), connection) == 0


@both_families
def test_z7_forwarded_queries(v: int) -> None:
    """Their answers come back by z4, so they must leave in the same zone."""
    forwarded = arrives(SERVER[v], 53, protocol="udp", local_destination=False)
    assert zone(listed(), forwarded) == UPSTREAM
    assert zone(listed(), dataclasses.replace(forwarded, destination=ip_address(REMOTE[v]))) == 0
    assert zone(listed(), dataclasses.replace(forwarded, local_destination=True)) == 0


def test_zones_are_for_dns_over_udp_and_only_when_split() -> None:
    assert zone(capture_all(split_zones=False), query(SERVER[4])) == 0
    assert zone(capture_all(), out(SERVER[4], 53)) == 0
    assert zone(DEFAULT, query(SERVER[4])) == 0
