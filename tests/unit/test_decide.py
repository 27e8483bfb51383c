"""The specification, rule by rule. Names are those of docs/ruleset.md."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decide import Action, Connection, Direction, State, Verdict, decide
from agent.policy import (
    ALL_PORTS,
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Redirection,
    UidExclusion,
    UidRange,
    VirtualNetwork,
    WhenProxyDown,
)

PROXY, APP, ROOT = 5678, 1000, 0
PIN, POUT, PDNS = 15006, 15001, 15053
DEFAULT = Policy(PROXY)
OWN = {4: "192.0.2.2", 6: "fd00::2"}
REMOTE = {4: "198.51.100.7", 6: "fd01::7"}
LOCAL = {4: "127.0.0.1", 6: "::1"}
PASS_SOURCE = {4: "127.0.0.6", 6: "::6"}
SERVER = {4: "10.0.0.53", 6: "fd00::53"}
both_families = pytest.mark.parametrize("v", [4, 6])


def policy(**parts: object) -> Policy:
    """The default policy with other parts."""
    return dataclasses.replace(DEFAULT, **parts)  # type: ignore[arg-type]


def listed(*servers: str, **parts: object) -> Policy:
    """A policy that captures DNS to some servers, both families' by default."""
    parsed = []
    for text in servers or SERVER.values():
        address, _, scope = text.partition("%")
        parsed.append(NameServer(ip_address(address), scope or None))
    dns = Dns(DnsCapture.LISTED, servers=tuple(parsed))
    return policy(dns=dataclasses.replace(dns, **parts))  # type: ignore[arg-type]


def capture_all(**parts: object) -> Policy:
    """A policy that captures all DNS."""
    return policy(dns=dataclasses.replace(Dns(DnsCapture.ALL), **parts))  # type: ignore[arg-type]


def out(to: str, port: int | None = 80, uid: int | None = APP, **more: object) -> Connection:
    """A connection of this host; over lo when it goes to this host itself."""
    destination = ip_address(to)
    own = to in OWN.values() or destination.is_loopback
    base = Connection(
        Direction.OUTBOUND, "tcp", ip_address(OWN[destination.version]), destination, port, "lo" if own else "eth0",
        uid=uid,
    )  # fmt: skip
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def query(to: str, uid: int | None = APP, **more: object) -> Connection:
    """A DNS query over UDP."""
    return out(to, 53, uid, **{"protocol": "udp", "source_port": 40000, **more})


def arrives(to: str, port: int | None = 8080, source: str | None = None, **more: object) -> Connection:
    """A connection from another host."""
    destination = ip_address(to)
    base = Connection(
        Direction.INBOUND, "tcp", ip_address(source or REMOTE[destination.version]), destination, port, "eth0"
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def verdict(asked: Policy, connection: Connection) -> tuple[str, Action, int | None]:
    """The rule that decided, and what it did."""
    answer = decide(asked, connection)
    return answer.rule, answer.action, answer.port


def passes(rule: str) -> tuple[str, Action, int | None]:
    return rule, Action.PASS, None


def goes_to(port: int, rule: str) -> tuple[str, Action, int | None]:
    return rule, Action.REDIRECT, port


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


VNETS = (VirtualNetwork("docker0", ip_network("172.17.0.0/16")), VirtualNetwork("br+", ip_network("fd17::/64")))


SERVICE = Cgroup("system.slice/app.service", 7)


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


def test_i7_the_listeners_own_ports_and_ssh_are_nothing_special() -> None:
    for port in (PIN, POUT, 22):
        assert verdict(DEFAULT, arrives(OWN[4], port)) == goes_to(PIN, "i7")


EXCLUDE_APP = (UidExclusion(Protocol.TCP, (PortRange(80, 90),), UidRange(1000, 1001)),)


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


UPSTREAM, CAPTURED = 1, 2


def zone(asked: Policy, connection: Connection) -> int:
    return decide(asked, connection).zone


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


addresses = st.sampled_from([ip_address(text) for table in (OWN, REMOTE, LOCAL, SERVER) for text in table.values()])


@st.composite
def connections(draw: st.DrawFn) -> Connection:
    """Any connection between the addresses above."""
    destination = draw(addresses)
    return Connection(
        direction=draw(st.sampled_from(Direction)),
        protocol=draw(st.sampled_from(["tcp", "udp", "icmp"])),
        source=draw(addresses.filter(lambda address: address.version == destination.version)),
        destination=destination,
        destination_port=draw(st.sampled_from([22, 53, 80, PIN, POUT, PDNS])),
        source_port=draw(st.sampled_from([53, 40000, PDNS])),
        interface=draw(st.sampled_from(["lo", "eth0", "docker0"])),
        uid=draw(st.sampled_from([None, ROOT, APP, PROXY])),
        local_destination=draw(st.booleans()),
        state=draw(st.sampled_from(State)),
    )


POLICIES = [
    DEFAULT, listed(), capture_all(tcp=True), policy(virtual_networks=VNETS), policy(drop_invalid=True),
    policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False)),
    policy(outbound=Outbound(exclude_uids=EXCLUDE_APP, include_ports=(PortRange(80),))),
]  # fmt: skip


@given(st.sampled_from(POLICIES), connections())
def test_every_verdict_is_sound(asked: Policy, connection: Connection) -> None:
    answer: Verdict = decide(asked, connection)
    assert answer.steps[-1].applied
    assert answer.reason
    assert (answer.port is not None) == (answer.action is Action.REDIRECT)
    if connection.state is not State.NEW:
        assert answer.action is not Action.REDIRECT
    if connection.direction is Direction.OUTBOUND and connection.uid == PROXY:
        assert answer.port in (None, PIN), "the data plane must never be sent to its own outbound or DNS port"


TRANSPARENT = policy(inbound=Inbound(mode=Redirection.TPROXY, exclude_ports=(PortRange(22),)))


@pytest.mark.parametrize("to", ["10.0.0.5", "fd00::5"])
def test_tproxy_is_for_what_arrives(to: str) -> None:
    arrived = decide(TRANSPARENT, arrives(to))
    assert (arrived.rule, arrived.port, arrived.how) == ("i7", 15006, Redirection.TPROXY)
    assert decide(TRANSPARENT, arrives(to, 22)).how is None
    self_call = decide(TRANSPARENT, out(to, uid=PROXY, interface="lo"))
    assert (self_call.rule, self_call.how) == ("i7", Redirection.REDIRECT)
    assert decide(policy(), arrives(to)).how is Redirection.REDIRECT


@pytest.mark.parametrize("to", ["10.0.0.5", "fd00::5"])
def test_t1_the_data_plane_dials_in_a_clients_name(to: str) -> None:
    dialled = out(to, uid=PROXY, interface="lo", local_source=False)
    assert verdict(TRANSPARENT, dialled) == passes("t1")
    assert verdict(TRANSPARENT, dataclasses.replace(dialled, uid=APP)) == passes("o4")
    assert decide(policy(), dialled).action is Action.REDIRECT
    off = dataclasses.replace(TRANSPARENT, inbound=dataclasses.replace(TRANSPARENT.inbound, enabled=False))
    assert decide(off, dialled).rule != "t1"
