"""g1: what is aimed at the data plane's own ports, and what only looks like it."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest

from tests.unit.spec.asking import (
    APP,
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
    SERVICE,
    VNETS,
    arrives,
    both_families,
    goes_to,
    out,
    passes,
    policy,
    verdict,
)
from tpctl.spec.connection import State
from tpctl.spec.guard import guarded_ports
from tpctl.spec.policy import Dns, DnsCapture, Family, Inbound, Outbound, PortRange, Redirection
from tpctl.spec.verdict import Action

RESET = ("g1", Action.RESET, None)
every_port = pytest.mark.parametrize("port", [PIN, POUT, PDNS])


@both_families
@every_port
def test_nobody_reaches_the_ports_but_the_data_planes_user_over_loopback(v: int, port: int) -> None:
    assert verdict(DEFAULT, arrives(OWN[v], port)) == RESET
    for to in (LOCAL[v], OWN[v]):
        for uid in (APP, ROOT):
            assert verdict(DEFAULT, out(to, port, uid)) == RESET
    assert verdict(DEFAULT, out(LOCAL[v], port, PROXY)) == passes("o5")
    assert verdict(DEFAULT, out(OWN[v], port, PROXY)) == goes_to(PIN, "i7")


@both_families
def test_of_udp_only_the_dns_port_is_guarded(v: int) -> None:
    assert verdict(DEFAULT, arrives(OWN[v], PDNS, protocol="udp")) == RESET
    assert verdict(DEFAULT, out(LOCAL[v], PDNS, protocol="udp")) == RESET
    assert verdict(DEFAULT, out(LOCAL[v], PDNS, PROXY, protocol="udp")) == passes("d0")
    for port in (PIN, POUT):
        assert verdict(DEFAULT, arrives(OWN[v], port, protocol="udp")) == passes("p2")


@both_families
@every_port
def test_the_same_ports_of_others_are_like_any(v: int, port: int) -> None:
    assert verdict(DEFAULT, out(REMOTE[v], port)) == goes_to(POUT, "o7")
    assert verdict(DEFAULT, out(REMOTE[v], port, PROXY)) == passes("o5")
    assert verdict(DEFAULT, arrives(REMOTE[v], port, local_destination=False)) == passes("i0")


def test_containers() -> None:
    asked = policy(virtual_networks=VNETS)
    for to in (OWN[4], "172.17.0.1"):
        assert verdict(asked, arrives(to, POUT, "172.17.0.2", interface="docker0")) == RESET
    elsewhere = arrives(REMOTE[4], POUT, "172.17.0.2", interface="docker0", local_destination=False)
    assert verdict(asked, elsewhere) == goes_to(POUT, "i2")


@both_families
def test_no_exclusion_leads_there(v: int) -> None:
    everybody = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    policies = (
        policy(inbound=Inbound(exclude_sources=everybody, exclude_ports=(PortRange(PIN),))),
        policy(inbound=Inbound(include_ports=(PortRange(80),))),
        policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False)),
        policy(inbound=Inbound(mode=Redirection.TPROXY)),
        policy(outbound=Outbound(exclude_uids=EXCLUDE_APP, exclude_destinations=everybody)),
        policy(cgroup=SERVICE),
        policy().through("ebpf"),
    )
    for asked in policies:
        assert verdict(asked, arrives(OWN[v], PIN)) == RESET
        assert verdict(asked, out(LOCAL[v], POUT)) == RESET
        assert verdict(asked, out(LOCAL[v], POUT, source=ip_address(PASS_SOURCE[v]))) == RESET


def test_before_what_the_kernel_drops_or_cannot_redirect() -> None:
    """Where the kernel is told to route 127.0.0.0/8 (route_localnet), it would get there."""
    assert verdict(DEFAULT, arrives("127.0.0.1", PIN)) == RESET
    own_link_local = dataclasses.replace(out("fe80::1", POUT), interface="lo")
    assert verdict(DEFAULT, own_link_local) == RESET


@both_families
def test_connections_that_run_go_on(v: int) -> None:
    for state in (State.MIDSTREAM, State.ESTABLISHED):
        assert verdict(DEFAULT, arrives(OWN[v], PIN, state=state)) == passes("n1")
        assert verdict(DEFAULT, out(LOCAL[v], PDNS, protocol="udp", state=state)) == passes("n1")


def test_a_family_that_is_left_alone_is_left_alone() -> None:
    assert verdict(policy(families=frozenset({Family.IPV4})), arrives(OWN[6], PIN)) == passes("f1")


def test_a_dns_listener_on_port_53_looks_like_any_server() -> None:
    asked = policy(dns=Dns(DnsCapture.ALL, port=53))
    assert guarded_ports(asked, "tcp") == (POUT, PIN)
    assert guarded_ports(asked, "udp") == ()
    assert verdict(asked, out(LOCAL[4], 53, protocol="udp")) == goes_to(53, "d3")


@both_families
def test_without_the_guard(v: int) -> None:
    asked = policy(guard_ports=False)
    assert verdict(asked, arrives(OWN[v], POUT)) == goes_to(PIN, "i7")
    assert verdict(asked, out(LOCAL[v], POUT)) == passes("o4")
    assert guarded_ports(asked, "tcp") == ()
