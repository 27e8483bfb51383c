"""What has to listen for a policy on a host, and whose a socket is."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tpctl.change.listening import PortStatus, Seen, port_status
from tpctl.engines.landings import landings, ports
from tpctl.host.holders import Process
from tpctl.host.interfaces import HostAddress
from tpctl.host.sockets import Listener
from tpctl.spec.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, Protocol, VirtualNetwork

PROXY = 5678
POLICY = Policy(PROXY)
LO = tuple(HostAddress("lo", ip_address(one)) for one in ("127.0.0.1", "::1", "::6"))
V4 = HostAddress("eth0", ip_address("10.0.0.5"))
V6 = HostAddress("eth0", ip_address("fd00::5"))
LINK_LOCAL = HostAddress("eth0", ip_address("fe80::5"))
SYSTEMD = Process(1, 0, "systemd")


def lands(policy: Policy, *host: HostAddress, engine: str = "nftables") -> list[tuple[int, str]]:
    return [(one.port.number, str(one.address)) for one in landings(policy, engine, (*LO, *host))]


def test_a_family_counts_in_which_the_host_has_an_address() -> None:
    assert lands(POLICY) == []
    assert lands(POLICY, V4, LINK_LOCAL) == [(15001, "127.0.0.1"), (15006, "10.0.0.5")]
    assert lands(POLICY, V6) == [(15001, "::1"), (15006, "fd00::5")]
    assert lands(replace(POLICY, families=frozenset()), V4, V6) == []


def test_an_address_that_only_lo_has_is_called_from_elsewhere() -> None:
    """As that of a router, or an anycast one."""
    (_, arriving) = landings(POLICY, "nftables", (*LO, HostAddress("lo", ip_address("192.0.2.7"))))
    assert (str(arriving.address), arriving.interface) == ("192.0.2.7", None)


def test_programs_need_a_wildcard_socket() -> None:
    assert lands(POLICY, V4, engine="ebpf") == [(15001, "127.0.0.1"), (15006, "0.0.0.0")]


def test_queries_to_a_resolver_on_this_host_need_no_address() -> None:
    dns = Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("127.0.0.53")), NameServer(ip_address("fd00::53"))))
    assert lands(replace(POLICY, dns=dns)) == [(15053, "127.0.0.1")]
    assert lands(replace(POLICY, dns=replace(dns, capture=DnsCapture.ALL))) == [(15053, "127.0.0.1")]


@pytest.mark.parametrize(("name", "address"), [("br9", "172.30.0.1"), ("br8", "0.0.0.0"), ("br+", "172.30.0.1")])
def test_a_virtual_network_lands_at_its_bridge(name: str, address: str) -> None:
    policy = Policy(
        PROXY,
        inbound=Inbound(enabled=False),
        outbound=Outbound(enabled=False),
        virtual_networks=(VirtualNetwork(name, ip_network("172.30.0.0/24")),),
    )
    bridge = HostAddress("br9", ip_address("172.30.0.1"))
    assert lands(policy, V4, V6, bridge) == [(15001, address), (15053, address)]
    assert {(one.protocol, one.number) for one in ports(policy)} == {(Protocol.TCP, 15001), (Protocol.UDP, 15053)}


def outbound(listener: Listener, *processes: Process) -> PortStatus:
    """What is said of a socket that these processes hold."""
    port = next(one for one in ports(POLICY) if one.role == "outbound")
    seen = Seen((listener,), {listener.inode: processes})
    return port_status(port, landings(POLICY, "nftables", (*LO, V4, V6)), POLICY, seen)


def listener(uid: int) -> Listener:
    return Listener(Protocol.TCP, ip_address("::"), 15001, uid, 7)


@pytest.mark.parametrize(
    ("maker", "processes", "uids"),
    [
        (PROXY, (), (PROXY,)),
        (0, (), (0,)),
        (0, (Process(20, PROXY, "envoy"),), (PROXY,)),
        (0, (SYSTEMD, Process(20, PROXY, "envoy")), (PROXY,)),
        (0, (SYSTEMD,), (PROXY,)),
        (0, (Process(1, 0, "app"),), (0,)),
        (PROXY, (Process(20, 0, "root"),), (PROXY,)),
        (PROXY, (Process(20, 1000, "other"),), (1000,)),
        (PROXY, (Process(20, 1000, "other"), Process(21, 0, "root")), (0, 1000)),
    ],
)
def test_a_socket_is_of_the_users_whose_processes_hold_it(
    maker: int, processes: tuple[Process, ...], uids: tuple[int, ...]
) -> None:
    found = outbound(listener(maker), *processes)
    assert found.uids == uids
    assert (found.problem is None) == (uids == (PROXY,))
    assert found.problem is None or f"runs as uid {', '.join(map(str, uids))}" in found.problem


def test_one_process_of_several_may_be_stopped() -> None:
    running, stopped = Process(20, PROXY, "envoy"), Process(21, PROXY, "envoy", is_stopped=True)
    assert outbound(listener(PROXY), running, stopped).problem is None
    assert "is stopped" in str(outbound(listener(PROXY), stopped).problem)
