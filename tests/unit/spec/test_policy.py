"""The parts of a policy."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.spec.policy import (
    MAX_UID,
    Dns,
    DnsCapture,
    Family,
    NameServer,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
    contains,
    includes,
    of_family,
)


@given(st.integers(1, 65535), st.integers(1, 65535), st.integers(0, 70000))
def test_port_range_holds_both_ends(one: int, other: int, port: int) -> None:
    ports = PortRange(min(one, other), max(one, other))
    assert ports.first in ports
    assert ports.last in ports
    assert (port in ports) == (ports.first <= port <= ports.last)


@pytest.mark.parametrize("bounds", [(0,), (65536,), (-1,), (1, 65536), (2, 1)])
def test_bad_port_range(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        PortRange(*bounds)


@pytest.mark.parametrize("bounds", [(-2,), (2**32 - 1,), (2, 1), (0, 2**32)])
def test_bad_uid_range(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        UidRange(*bounds)


def test_uid_range() -> None:
    assert 0 in UidRange(0)
    assert 1 not in UidRange(0)
    assert MAX_UID in UidRange(0, MAX_UID)
    assert None not in UidRange(0, MAX_UID)


def test_texts() -> None:
    rule = UidExclusion(Protocol.UDP, (PortRange(53), PortRange(1, 2)), UidRange(3, 4))
    assert str(rule) == "udp:53,1-2:3-4"
    assert str(VirtualNetwork("br+", ip_network("fd00::/64"))) == "br+:fd00::/64"
    assert str(NameServer(ip_address("fe80::1"), "eth0")) == "fe80::1%eth0"


def test_virtual_network_wildcard() -> None:
    exact, wild = (VirtualNetwork(name, ip_network("10.0.0.0/8")) for name in ("br0", "br+"))
    assert [exact.carries(name) for name in ("br0", "br01", "br")] == [True, False, False]
    assert [wild.carries(name) for name in ("br0", "br", "eth0")] == [True, True, False]


def test_families() -> None:
    policy = Policy(
        1,
        dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("10.0.0.1")),)),
        virtual_networks=tuple(
            VirtualNetwork(name, ip_network(network))
            for name, network in (("docker2", "10.2.0.0/16"), ("docker0", "10.0.0.0/16"), ("br+", "fd00::/64"))
        ),
    )
    assert [vnet.interface for vnet in policy.networks(Family.IPV4)] == ["docker0", "docker2"]
    assert [vnet.interface for vnet in policy.networks(Family.IPV6)] == ["br+"]
    assert policy.captures_dns(Family.IPV4)
    assert not policy.captures_dns(Family.IPV6)
    assert not policy.splits_zones(Family.IPV6)


@pytest.mark.parametrize(("capture", "expected"), [(DnsCapture.OFF, False), (DnsCapture.ALL, True)])
def test_captures_dns(capture: DnsCapture, expected: bool) -> None:
    assert Policy(1, dns=Dns(capture)).captures_dns(Family.IPV6) is expected


def test_helpers() -> None:
    networks = [ip_network("10.0.0.0/8"), ip_network("::/0")]
    assert contains(networks, ip_address("10.1.1.1"))
    assert not contains(networks[:1], ip_address("::a01:101"))
    assert not contains(networks, ip_address("11.0.0.0"))
    assert list(of_family(networks, Family.IPV6)) == networks[1:]
    assert not includes((PortRange(1, 9),), None)
