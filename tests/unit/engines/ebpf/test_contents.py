"""What the maps hold for a policy."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.bpf.programs import POLICY_MAPS
from tpctl.engines.ebpf.contents import Contents, Settings, contents_for, describe
from tpctl.engines.ebpf.plan import EbpfPlan
from tpctl.spec.policy import (
    ALL_PORTS,
    MAX_UID,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    WhenProxyDown,
    includes,
)
from tpctl.system.errors import InputError

PLAIN = Policy(5678)
UIDS = (0, 1, 2, 999, 1000, 2**31 - 1, 2**31, MAX_UID - 1, MAX_UID)
PORTS = (1, 2, 53, 54, 63, 64, 127, 128, 65534, 65535)


def contents(policy: Policy) -> Contents:
    return contents_for(policy)


def in_list(found: Contents, number: int, port: int) -> bool:
    """The lookup of bpf/decide.c."""
    bits = found.ports[struct.pack("=I", number)]
    (word,) = struct.unpack_from("=Q", bits, (port >> 6) * 8)
    return bool(word >> (port & 63) & 1)


def excluded(found: Contents, protocol: Protocol, port: int, uid: int) -> bool:
    """The lookup of bpf/decide.c, with the longest prefix first as the kernel's trie has it."""
    for length in range(32, -1, -1):
        key = struct.pack("=I", length) + (uid >> (32 - length) << (32 - length)).to_bytes(4, "big")
        if key in found.users:
            number, dns = struct.unpack("=II", found.users[key])
            if protocol is Protocol.UDP:
                return bool(dns)
            return bool(number) and in_list(found, number, port)
    return False


uid_ranges = st.tuples(st.sampled_from(UIDS), st.sampled_from(UIDS)).map(lambda two: UidRange(min(two), max(two)))
port_ranges = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(lambda two: PortRange(min(two), max(two)))
exclusions = st.builds(
    UidExclusion,
    protocol=st.sampled_from(Protocol),
    ports=st.lists(port_ranges, min_size=1, max_size=3).map(tuple),
    uids=uid_ranges,
)


@given(rules=st.lists(exclusions, max_size=5), uid=st.sampled_from(UIDS), port=st.sampled_from(PORTS))
def test_users_of_overlapping_ranges(rules: list[UidExclusion], uid: int, port: int) -> None:
    found = contents(replace(PLAIN, outbound=Outbound(exclude_uids=tuple(rules))))
    for protocol in Protocol:
        asked = 53 if protocol is Protocol.UDP else port
        wanted = any(r.protocol is protocol and includes(r.ports, asked) and uid in r.uids for r in rules)
        assert excluded(found, protocol, asked, uid) is wanted


def test_every_user_is_one_entry_a_prefix() -> None:
    rule = UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(0, MAX_UID))
    found = contents(replace(PLAIN, outbound=Outbound(exclude_uids=(rule,))))
    assert len(found.users) == 32  # all 32-bit numbers but the last
    assert found.sizes()["users"] == 32


@given(ranges=st.lists(port_ranges, max_size=4), port=st.sampled_from(PORTS))
def test_ports_are_bits(ranges: list[PortRange], port: int) -> None:
    found = contents(replace(PLAIN, inbound=Inbound(exclude_ports=tuple(ranges))))
    assert in_list(found, 0, port) is includes(ranges, port)
    assert not in_list(found, 1, port)


def test_included_ports_stand_in_the_place_of_excluded_ones() -> None:
    both = Outbound(include_ports=(PortRange(80),), exclude_ports=(PortRange(22),))
    found = contents(replace(PLAIN, outbound=both))
    assert in_list(found, 1, 80)
    assert not in_list(found, 1, 22)
    assert "outbound_include" in found.settings.flags
    assert "inbound_include" not in found.settings.flags


def test_networks_of_the_families_are_apart() -> None:
    networks = tuple(map(ip_network, ("0.0.0.0/0", "::/0", "10.0.0.0/8")))
    found = contents(replace(PLAIN, outbound=Outbound(exclude_destinations=networks)))
    keys = {(length, number) for length, number in (struct.unpack_from("=II", key) for key in found.networks)}
    assert keys == {(32 + 96, 0), (32, 1), (32 + 96 + 8, 0)}


def test_scoped_servers_and_those_of_other_modes_are_no_servers() -> None:
    servers = (NameServer(ip_address("10.0.0.53")), NameServer(ip_address("fe80::53"), "eth0"))
    found = contents(replace(PLAIN, dns=Dns(DnsCapture.LISTED, servers=servers)))
    assert list(found.servers) == [bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 53))]
    assert "dns_ipv4" in found.settings.flags
    assert "dns_ipv6" not in found.settings.flags


@pytest.mark.parametrize("when", WhenProxyDown)
def test_settings_come_back(when: WhenProxyDown) -> None:
    settings = contents_for(replace(PLAIN, proxy_uid=MAX_UID, when_proxy_down=when)).settings
    assert Settings.unpack(settings.pack(2**63)) == (settings, 2**63)
    assert ("bypass" in settings.flags) is (when is WhenProxyDown.BYPASS)


def test_a_policy_of_one_family_says_so() -> None:
    flags = contents(replace(PLAIN, families=frozenset({Family.IPV6}))).settings.flags
    assert "ipv6" in flags
    assert "ipv4" not in flags


def test_every_entry_can_be_described() -> None:
    policy = replace(
        PLAIN,
        inbound=Inbound(exclude_ports=(PortRange(20, 22), PortRange(65535)), exclude_sources=(ip_network("::/0"),)),
        outbound=Outbound(
            exclude_destinations=(ip_network("10.0.0.0/8"),),
            exclude_uids=(UidExclusion(Protocol.TCP, (PortRange(80),), UidRange(1000)),),
        ),
        dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("10.0.0.53")),)),
    )
    text = EbpfPlan(contents(policy)).render()
    for part in (
        "map ports: list 0: 20-22,65535",
        "map networks: to 10.0.0.0/8",
        "map networks: from ::/0",
        "map users: uids 1000/32 tcp list 2 dns no",
        "map servers: 10.0.0.53",
        "program connect4 on the applications' cgroup",
        "proxy_uid 5678 ports 15006 15001 15053",
    ):
        assert part in text
    for name in POLICY_MAPS:
        for key, value in contents(policy).entries(name, 7).items():
            assert describe(name, key, value)


def test_kernel_log_lines_are_refused() -> None:
    with pytest.raises(InputError, match=r"--iptables-logs.*--engine nftables"):
        contents(replace(PLAIN, log_level=4))
