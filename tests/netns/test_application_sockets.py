"""What an application's socket is like beside its addresses: marked, of a tunnel's interface, MPTCP, TCP Fast Open."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

import pytest

from tests.netns import lab as netns_lab
from tests.netns.engines.ebpf_command import own_host
from tests.netns.lab import APP, PROXY, PROXY_USER, run
from tpctl.host import rules
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Bridge, Layout, Uplink
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.exclusions import Mark
from tpctl.spec.policy import Dns, DnsCapture, Family, Policy, Protocol

pytestmark = pytest.mark.root

NETFILTER = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
ENGINES = {**NETFILTER, "ebpf": ("--engine", "ebpf")}
REMOTE = {Family.IPV4: ip_address("203.0.113.10"), Family.IPV6: ip_address("2001:db8:10::10")}
TUNNEL = (ip_network("198.19.7.0/28"), ip_network("fd07::/64"))
CAPTURED = Policy(PROXY, dns=Dns(DnsCapture.ALL))
Command = Callable[..., str]
PROBLEMS = 3
"""The exit code of `tpctl status`: the laboratory's data plane is this process, which is root."""


@contextmanager
def host_of(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command line on a host for the engine; for eBPF, within a control group of its own."""
    if engine != "ebpf":
        yield lambda *words: _said(netns_lab.tpctl(*words, check=False))
        return
    with own_host(tmp_path_factory.mktemp("host")) as host:
        yield lambda *words: _said(host.tpctl(*words))


def _said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode in (0, PROBLEMS), done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_a_vpn_client_keeps_its_transport_out_of_its_tunnel(
    engine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with host_of(engine, tmp_path_factory) as tpctl, Lab(Layout()) as lab:
        marked = "--exclude-outbound-marks", "0x80000/0xff0000,51820"
        with lab.inside(HOST):
            tpctl("install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine], "--redirect-all-dns-traffic", *marked)
        lab.serve_data_plane(CAPTURED)
        for family in Family:
            for protocol, port, listener in ((Protocol.TCP, 443, 15001), (Protocol.UDP, 53, 15053)):
                plain = lab.layout.outgoing(protocol, REMOTE[family], port, 0)
                assert ends(lab, plain) == f"{HOST}:{listener}"
                assert ends(lab, dataclasses.replace(plain, mark=0x8ABCD)) == f"{PEER}:{port}"
                assert ends(lab, dataclasses.replace(plain, mark=51820)) == f"{PEER}:{port}"
                assert ends(lab, dataclasses.replace(plain, mark=51821)) == f"{HOST}:{listener}"
        with lab.inside(HOST):
            for version in ("-4", "-6"):  # the tunnel, which is not up before its transport is
                rules = ("ip", version, "rule", "add", "pref")
                run([*rules, "5210", "fwmark", "0x80000/0xff0000", "lookup", "main"])
                run([*rules, "5270", "lookup", "52"])
                run(["ip", version, "route", "add", "unreachable", "default", "table", "52"])
        for family in Family:
            transport = lab.layout.outgoing(Protocol.TCP, REMOTE[family], 443, 0)
            assert ends(lab, dataclasses.replace(transport, mark=0x80000)) == f"{PEER}:443"
        with lab.inside(HOST):
            shown = tpctl("explain", "outbound", "--mark", "0x80001", "--to", "203.0.113.10:443", "--uid", "0")
            assert "mark 0x80001" in shown
            assert "because: the mark 0x80001 is excluded (m1)" in shown
            assert "0x80000/0xff0000, 0xca6c\n" in tpctl("status")
            tpctl("uninstall")


def test_the_marks_of_routing_rules_are_found_and_followed() -> None:
    """As Tailscale and wg-quick write them; other rules about marks keep nothing out of a tunnel."""
    transport = Connection(
        Direction.OUTBOUND,
        Protocol.TCP,
        HOST_ADDRESS[Family.IPV4],
        REMOTE[Family.IPV4],
        443,
        "eth0",
        uid=0,
        mark=0x80000,
    )
    install = "install", "--kuma-dp-user", PROXY_USER, "--engine", "nftables"
    with Lab(Layout()) as lab:
        with lab.inside(HOST):
            rule = "ip", "rule", "add"
            run([*rule, "fwmark", "0x80000/0xff0000", "lookup", "main"])
            run(["ip", "-6", "rule", "add", "not", "fwmark", "51820", "lookup", "53"])
            for other in (("fwmark", "5", "lookup", "54"), ("iif", "eth0", "fwmark", "6", "lookup", "main")):
                run([*rule, *other])
            assert rules.kept_out_of_tunnels() == (Mark(0x80000, 0xFF0000), Mark(51820))
            said = netns_lab.tpctl(*install).stderr
            assert "routes connections with the mark 0x80000/0xff0000 apart" in said
        lab.serve_data_plane(Policy(PROXY))
        assert ends(lab, transport) == f"{PEER}:443"
        with lab.inside(HOST):
            run(["ip", "rule", "del", "fwmark", "0x80000/0xff0000", "lookup", "main"])
            assert "routes connections with these marks apart: 0xca6c" in netns_lab.tpctl("status", check=False).stdout
            netns_lab.tpctl("apply")
        assert ends(lab, transport) == f"{HOST}:15001"


def ends(lab: Lab, connection: Connection) -> str:
    """Who answers a connection."""
    lab.serve(connection)
    return str(lab.dial(connection))


@pytest.mark.parametrize("engine", NETFILTER)
def test_a_tunnel_is_left_alone_both_ways(engine: str) -> None:
    layout = Layout((Uplink("eth0"),), (Bridge("wg7", TUNNEL),))
    with Lab(layout) as lab:
        with lab.inside(HOST):
            flags = "--redirect-all-dns-traffic", "--exclude-interfaces", "tun0", "--exclude-interfaces", "wg+"
            netns_lab.tpctl("install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine], *flags)
        lab.serve_data_plane(CAPTURED)
        for network in TUNNEL:
            family, behind = Family.of(network), network[2]
            assert ends(lab, layout.outgoing(Protocol.TCP, behind, 443, APP)) == "wg7:443"
            assert ends(lab, layout.outgoing(Protocol.UDP, behind, 53, APP)) == "wg7:53"
            assert ends(lab, layout.arriving(behind, HOST_ADDRESS[family], Protocol.TCP, 8080)) == f"{HOST}:8080"
            assert ends(lab, layout.outgoing(Protocol.TCP, REMOTE[family], 443, APP)) == f"{HOST}:15001"
            assert (
                ends(lab, layout.arriving(REMOTE[family], HOST_ADDRESS[family], Protocol.TCP, 8080)) == f"{HOST}:15006"
            )
        with lab.inside(HOST):
            question = "explain", "outbound", "--to", "203.0.113.10:443", "--uid", "1000"
            assert "(e1)" in netns_lab.tpctl(*question, "--via", "wg8").stdout
            assert "(o7)" in netns_lab.tpctl(*question, "--via", "w").stdout
            for name, address in (("wg8", "198.19.8.1/24"), ("other8", "198.19.9.1/24")):
                run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}far"])
                run(["ip", "address", "add", address, "dev", name])
                for end in (name, f"{name}far"):
                    run(["ip", "link", "set", end, "up"])
            said = netns_lab.tpctl("status", check=False).stdout
            assert "tun0, wg+\n" in said
            # Both came after the install; what leaves by the excluded one does not have to reach the data plane.
            assert "bound to other8 do not reach the data plane" in said
