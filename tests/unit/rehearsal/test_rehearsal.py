"""The pure part of a rehearsal: topologies and probes as values."""

from __future__ import annotations

import select
import selectors
import socket
from ipaddress import ip_address, ip_network
from pathlib import Path
from unittest import mock

import pytest

from tpctl.host import cgroups
from tpctl.rehearsal.cgroup import OwnGroups
from tpctl.rehearsal.choices import application_uid
from tpctl.rehearsal.lab import NEGATIVE_SECONDS, PATIENCE_SECONDS, Lab, _Dial
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, LOOPBACK, PEER, Layout, stage
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.rehearse import attempt
from tpctl.rehearsal.sockets import Answer, Seat
from tpctl.spec.connection import Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import (
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Network,
    Outbound,
    Policy,
    PortRange,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)
from tpctl.spec.policy import Protocol as Transport
from tpctl.spec.verdict import Action
from tpctl.system.errors import HostError

PROXY = 5678


def test_a_pattern_gets_a_name_that_matches_it() -> None:
    vnets = (
        VirtualNetwork("br+", ip_network("172.30.0.0/16")),
        VirtualNetwork("br0", ip_network("10.44.0.0/24")),
        VirtualNetwork("averyverylongn+", ip_network("10.45.0.0/24")),
    )
    names = [bridge.name for bridge in stage(Policy(PROXY, virtual_networks=vnets)).layout.bridges]
    assert len(set(names)) == 3
    assert all(len(name) <= 15 for name in names)
    assert all(any(vnet.carries(name) for name in names) for vnet in vnets)


def test_both_families_of_a_virtual_network_share_a_bridge() -> None:
    vnets = (VirtualNetwork("docker0", ip_network("10.44.0.0/24")), VirtualNetwork("docker0", ip_network("fd44::/64")))
    (bridge,) = stage(Policy(PROXY, virtual_networks=vnets)).layout.bridges
    assert bridge.networks == (ip_network("10.44.0.0/24"), ip_network("fd44::/64"))
    assert bridge.network(Family.IPV6) == ip_network("fd44::/64")


@pytest.mark.parametrize(
    ("address", "node"),
    [
        ("127.0.0.53", HOST),
        ("::1", HOST),
        ("198.19.255.2", HOST),
        ("198.19.255.9", PEER),
        ("8.8.8.8", PEER),
        ("172.30.0.1", HOST),
        ("172.30.0.2", "br0"),
        ("172.30.5.5", "docker0"),
    ],
)
def test_who_has_an_address(address: str, node: str) -> None:
    vnets = (
        VirtualNetwork("br0", ip_network("172.30.0.0/16")),
        VirtualNetwork("docker0", ip_network("172.30.5.0/24")),
    )
    assert stage(Policy(PROXY, virtual_networks=vnets)).layout.locate(ip_address(address)) == node


@pytest.mark.parametrize(
    ("destination", "source", "interface"),
    [
        ("127.0.0.2", "127.0.0.1", LOOPBACK),
        ("::1", "::1", LOOPBACK),
        ("198.19.255.2", "198.19.255.2", LOOPBACK),
        ("8.8.8.8", "198.19.255.2", "eth0"),
        ("fe80::9", "fe80::7063:2", "eth0"),
    ],
)
def test_sources_and_interfaces_are_those_of_the_kernel(destination: str, source: str, interface: str) -> None:
    connection = Layout().outgoing("tcp", ip_address(destination), 80, 1000)
    assert (str(connection.source), connection.interface) == (source, interface)
    assert connection.direction is Direction.OUTBOUND


def test_an_uplink_is_named_after_a_scoped_name_server() -> None:
    servers = (NameServer(ip_address("fe80::53"), "wlan7"), NameServer(ip_address("fe80::54"), "lo"))
    staging = stage(Policy(PROXY, dns=Dns(DnsCapture.LISTED, servers=servers)))
    assert [uplink.name for uplink in staging.layout.uplinks] == ["wlan7"]
    assert staging.notes == ("name server fe80::54%lo: its interface cannot be rehearsed",)


def test_a_kernel_without_ipv6() -> None:
    staging = stage(Policy(PROXY), frozenset({Family.IPV4}))
    assert staging.policy.families == {Family.IPV4}
    assert staging.notes == ("this kernel has no IPv6: not rehearsed",)
    assert {probe.connection.family for probe in probes(staging.policy, staging.layout)} == {Family.IPV4}


def test_the_application_is_nobody_whom_the_policy_excludes() -> None:
    excluded = UidExclusion(Transport.TCP, (PortRange(443),), UidRange(1000, 1001))
    assert application_uid(Policy(PROXY)) == 1000
    assert application_uid(Policy(1000)) == 1001
    assert application_uid(Policy(1002, outbound=Outbound(exclude_uids=(excluded,)))) == 4242


def test_ordinary_probes_are_redirected_whatever_the_lists_say() -> None:
    """Or the probes would show that everything passes, which a host without rules does too."""
    policy = Policy(
        PROXY,
        inbound=Inbound(
            include_ports=(PortRange(15006), PortRange(9000, 9010)), exclude_sources=(_net("203.0.113.0/24"),)
        ),
        outbound=Outbound(exclude_ports=(PortRange(8000, 8999),), exclude_destinations=(_net("198.51.100.0/24"),)),
    )
    found = {probe.label: probe.connection for probe in probes(policy, Layout())}
    for family in Family:
        for label in ("inbound", "outbound by an application", "outbound by root"):
            assert decide(policy, found[f"IPv{family} {label}"]).action is Action.REDIRECT
    assert found["IPv4 inbound"].destination == HOST_ADDRESS[Family.IPV4]


def _net(text: str) -> Network:
    return ip_network(text)


def test_a_policy_with_very_many_ranges_is_sampled() -> None:
    many = tuple(PortRange(1000 + 3 * number) for number in range(5000))
    assert len(probes(Policy(PROXY, inbound=Inbound(exclude_ports=many)), Layout())) < 250


def test_labels_tell_probes_apart() -> None:
    servers = (NameServer(ip_address("10.0.0.53")), NameServer(ip_address("2001:db8::53")))
    policy = Policy(
        PROXY,
        inbound=Inbound(exclude_ports=(PortRange(22), PortRange(5000, 5010))),
        dns=Dns(DnsCapture.LISTED, servers=servers),
        virtual_networks=(VirtualNetwork("br+", ip_network("172.30.0.0/16")),),
    )
    staging = stage(policy)
    labels = [probe.label for probe in probes(staging.policy, staging.layout)]
    assert len(labels) == len(set(labels))


def test_another_cgroup_stands_for_the_policys() -> None:
    theirs, ours = Cgroup("system.slice/app.service", 7), Cgroup("rehearsal/app.service", 8)
    assert stage(Policy(PROXY), cgroup=ours).policy.cgroup is None
    assert stage(Policy(PROXY, cgroup=theirs)).policy.cgroup == theirs
    staging = stage(Policy(PROXY, cgroup=theirs, dns=Dns(DnsCapture.ALL)), cgroup=ours)
    assert staging.policy.cgroup == ours
    found = [probe.connection for probe in probes(staging.policy, staging.layout)]
    leaving = [each for each in found if each.direction is Direction.OUTBOUND]
    assert {each.cgroup for each in leaving} == {"rehearsal/app.service", "rehearsal/app.service/worker", "rehearsal"}
    assert {each.cgroup for each in found if each.direction is Direction.INBOUND} == {None}
    rules = {decide(staging.policy, each).rule for each in leaving if each.cgroup == "rehearsal"}
    assert rules == {"c1", "g1"}


def test_only_cgroups_of_the_rehearsal_are_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "root", lambda: tmp_path)
    groups = OwnGroups(tmp_path / "home", Cgroup("home/app.service", 7))
    for path in ("", "system.slice", "home2"):
        with pytest.raises(HostError, match="none of this rehearsal"), groups.inside(path):
            pytest.fail("entered")


def test_an_answer_that_had_come_when_the_time_was_up_counts() -> None:
    """On a busy machine the one who waits for it may be the one who is late."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as dialler,
        listener.accept()[0] as far,
        selectors.DefaultSelector() as selector,
    ):
        far.sendall(b"host:8080")
        select.select([dialler], [], [])
        dial = _Dial(selector, dialler, Transport.TCP, relayed=False)
        dial.seen = Answer("answered", Seat(HOST, 8080))
        selector.register(dialler, selectors.EVENT_READ, None)
        dial._turn(deadline=0.0)
        assert dial.result == dial.seen


def test_a_kernel_that_is_silent_where_it_should_answer_is_waited_for_patiently_once() -> None:
    layout, waited = Layout(), []
    lab = mock.create_autospec(Lab, instance=True, layout=layout)

    def dial(_connection: object, *, timeout: float) -> Answer:
        waited.append(timeout)
        return Answer("timeout")

    lab.dial.side_effect = dial
    wanted = probes(Policy(PROXY), layout)[:4]
    assert not any(result.ok for result in attempt(lab, Policy(PROXY), wanted))
    assert waited == [PATIENCE_SECONDS, NEGATIVE_SECONDS, NEGATIVE_SECONDS, NEGATIVE_SECONDS]
