"""The specification of TPROXY, loopback addresses and bound sockets; and that every verdict is sound."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.spec.asking import (
    APP,
    DEFAULT,
    EXCLUDE_APP,
    LOCAL,
    OWN,
    PDNS,
    PIN,
    POUT,
    PROXY,
    REMOTE,
    ROOT,
    SERVER,
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
)
from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.decide import decide
from tpctl.spec.policy import (
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Redirection,
    VirtualNetwork,
)
from tpctl.spec.verdict import Action, Verdict

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


THIS_HOST = ("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")


@pytest.mark.parametrize("to", THIS_HOST)
def test_what_arrives_for_a_loopback_address_is_left_to_the_kernel(to: str) -> None:
    networks = (VirtualNetwork("eth0", ip_network("10.9.0.0/16")), VirtualNetwork("eth0", ip_network("fd09::/64")))
    everything = dataclasses.replace(capture_all(tcp=True), virtual_networks=networks)
    for protocol, port in (("tcp", 8080), ("tcp", 53), ("udp", 53)):
        asked = arrives(to, port, protocol=protocol)
        assert verdict(everything, asked) == passes("l1")
        assert decide(everything, asked).zone == 0
        assert verdict(everything, dataclasses.replace(asked, interface="lo"))[0] != "l1"


@pytest.mark.parametrize("to", ["::2", "::6", "1.0.0.1", "128.0.0.1", "::ffff:128.0.0.1", "::127.0.0.1", "192.0.2.99"])
def test_other_addresses_are_redirected_whatever_interface_has_them(to: str) -> None:
    assert verdict(DEFAULT, arrives(to)) == goes_to(PIN, "i7")


@both_families
def test_sockets_that_are_bound_to_an_interface(v: int) -> None:
    bound = out(REMOTE[v], device="eth0")
    stuck = dataclasses.replace(bound, device_leads_to_loopback=False)
    asked = capture_all()
    assert verdict(DEFAULT, bound) == goes_to(POUT, "o7")
    assert verdict(DEFAULT, stuck) == ("d1", Action.DROP, None)
    assert verdict(asked, query(SERVER[v], device="eth0")) == goes_to(PDNS, "d3")
    assert verdict(asked, query(SERVER[v], device="eth0", device_leads_to_loopback=False)) == ("d1", Action.DROP, None)
    for untouched in (dataclasses.replace(stuck, uid=PROXY), dataclasses.replace(stuck, protocol="icmp")):
        assert decide(DEFAULT, untouched).action is Action.PASS
    assert verdict(DEFAULT, out(REMOTE[v], device="lo", device_leads_to_loopback=False)) == goes_to(POUT, "o7")


@both_families
def test_the_ebpf_engine_leaves_bound_sockets_alone(v: int) -> None:
    by_ebpf = capture_all().through("ebpf")
    for asked in (out(REMOTE[v], device="eth0"), query(SERVER[v], device="eth0")):
        assert verdict(by_ebpf, asked) == passes("d1")
        assert verdict(by_ebpf, dataclasses.replace(asked, device="lo"))[0] in ("o7", "d3")
        assert decide(by_ebpf.through("nftables"), asked).action is Action.REDIRECT
