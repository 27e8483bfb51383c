"""`tpctl check` sends from the virtual networks of a policy: by a port of its own on their bridge, for a second."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.netns.lab import run, tpctl
from tests.netns.probed import ENGINES, INSTALL, begun, capture, checked, devices, everything, net, on_its_own
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import Net, until
from tpctl.arrival import bridged
from tpctl.rehearsal.cgroup import own_place
from tpctl.spec.policy import VirtualNetwork
from tpctl.system.errors import HostError

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("on_its_own")]
__all__ = ["net", "on_its_own"]

BRIDGE = "br-app"
NETWORKS = {4: "172.30.0.0/24", 6: "fd30::/64"}
GATEWAY = {4: "172.30.0.1", 6: "fd30::1"}
VNETS = tuple(word for network in NETWORKS.values() for word in ("--vnet", f"br-+:{network}"))
KINDS = ("TCP", "DNS UDP")
BY_THEMSELVES = ("fe80::", "ff02::")
"""What neighbours begin with that the kernel learns while it looks for routers and groups, in its own time."""


@pytest.fixture
def container(net: Net) -> str:
    """The link of a container on a bridge, which forwards; its other end is in the peer's namespace."""
    net.on_host("ip", "link", "add", BRIDGE, "type", "bridge")
    net.on_host("ip", "link", "add", "vethc", "type", "veth", "peer", "name", "container", "netns", net.peer)
    net.on_host("ip", "link", "set", "vethc", "master", BRIDGE, "up")
    net.on_host("ip", "link", "set", BRIDGE, "up")
    for family, address in GATEWAY.items():
        prefix = ip_network(NETWORKS[family]).prefixlen
        net.on_host("ip", "address", "add", f"{address}/{prefix}", "dev", BRIDGE)
    net.on_host("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    relay_net.run("ip", "-n", net.peer, "link", "set", "container", "up")
    until(lambda: " state UP " in net.on_host("ip", "link", "show", BRIDGE))
    return "container"


def bridge() -> dict[str, str]:
    """What a port may have changed of it, or left with it."""
    (link,) = json.loads(run(["ip", "-json", "link", "show", BRIDGE]).stdout)
    neighbours = run(["ip", "neighbour", "show", "dev", BRIDGE, "nud", "all"]).stdout
    return {
        "mac": link["address"],
        "mtu": link["mtu"],
        "neighbours": "".join(line for line in neighbours.splitlines(True) if not line.startswith(BY_THEMSELVES)),
        "ports": run(["ip", "-brief", "link", "show", "master", BRIDGE]).stdout,
    }


@contextlib.contextmanager
def senders(net: Net, link: str) -> Iterator[set[bytes]]:
    """The link addresses from which anything comes by a container's link meanwhile; filled at the end."""
    found: set[bytes] = set()
    with net.inside(net.peer):
        tap = relay_net.hearing(link, socket.SOCK_RAW)
    with tap:
        tap.setblocking(False)
        yield found
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_, _, kind, _, _) = tap.recvfrom(256)
                if kind != socket.PACKET_OUTGOING:
                    found.add(frame[6:12])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_network_is_probed_and_nobody_on_its_bridge_sees_it(
    net: Net, container: str, engine: str, tmp_path: Path
) -> None:
    transparent = ("--transparent",) if engine == "tproxy" else ()
    with relay_net.relay(net, tmp_path, *transparent), net.inside(net.host):
        tpctl(*INSTALL, *ENGINES[engine], *VNETS, "--no-probe")
        before, shown = everything(), bridge()
        with senders(net, container) as seen, capture("eth0") as left:
            fates, document = checked()
        wanted = {f"virtual network {BRIDGE} {kind} over IPv{family}" for kind in KINDS for family in NETWORKS}
        assert {name for name in fates if "virtual" in name} == wanted
        assert set(fates.values()) == {"arrived"}, document
        ends = {one["name"]: one["detail"] for one in document["probes"] if "virtual" in one["name"]}
        assert all("end to end" in ends[name] for name in wanted if "DNS" not in name), ends
        assert document["notProbed"] == []
        assert left == []
        assert seen <= {bytes.fromhex(shown["mac"].replace(":", ""))}, "others on the bridge have seen the port"
        until(lambda: everything() == before and bridge() == shown)
        tpctl("uninstall")


def test_a_network_whose_connections_are_dropped_or_pass_by(net: Net, container: str) -> None:
    """Nobody listens: a stand-in shows the way. The rule that closes it is named."""
    with net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], *VNETS, "--no-probe")
        fates, document = checked()
        assert set(fates.values()) == {"refused"}, document
        assert all("the way there is open" in one["detail"] for one in document["probes"])
        run(["iptables-nft", "-A", "INPUT", "-i", BRIDGE, "-p", "tcp", "-j", "DROP"])
        fates, document = checked()
        name = f"virtual network {BRIDGE} TCP over IPv4"
        assert {name for name, fate in fates.items() if fate == "lost"} == {name}
        (said,) = (one["finding"]["where"] for one in document["probes"] if one["name"] == name)
        assert f"-i {BRIDGE} -p tcp -j DROP" in said
        run(["nft", "flush", "chain", "inet", "tpctl", "prerouting_first"])
        with capture("eth0") as left:
            fates, document = checked()
        assert {fates[f"virtual network {BRIDGE} TCP over IPv{family}"] for family in (4, 6)} == {"passed by"}
        assert left == []
        tpctl("uninstall")


def test_through_ebpf(net: Net, container: str, tmp_path: Path) -> None:
    with own_place() as place:
        flags = ("--engine", "ebpf", "--ebpf-cgroup-path", str(place.cgroup), "--ebpf-bpffs-path", str(place.pins))
        with relay_net.relay(net, tmp_path), net.inside(net.host):
            tpctl(*INSTALL, *flags, *VNETS, "--no-probe")
            fates, document = checked()
            assert set(fates.values()) == {"arrived"}, document
            assert len([name for name in fates if "virtual" in name]) == 4
            tpctl("uninstall")


@pytest.mark.parametrize("whom", ["command", "child", "both"])
def test_nothing_is_left_of_a_port_when_the_check_is_killed(net: Net, container: str, whom: str) -> None:
    """But for what the bridge has learnt, where nobody is left to take that away: it forgets, as of any container."""
    assert container
    with net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], *VNETS, "--no-probe")
        run(["iptables", "-w", "-A", "INPUT", "-p", "tcp", "--dport", "15006", "-j", "DROP"])  # so that it takes long
        before, shown = everything(), bridge()
        command, child = begun()
        assert len(devices()) == 3
        if whom != "child":
            command.kill()
        if whom != "command":
            os.kill(child, signal.SIGKILL)
        command.wait()
        until(lambda: not devices() and everything() == before)
        if whom == "both":
            assert "PERMANENT" not in bridge()["neighbours"]
        until(lambda: bridge() | {"neighbours": ""} == shown | {"neighbours": ""})
        if whom != "both":
            until(lambda: bridge() == shown)
        tpctl("uninstall")


UNFIT = {
    "none0:10.1.0.0/16": ("", "this host has no interface none0"),
    "eth0:10.1.0.0/16": ("", "eth0 is no bridge"),
    "br-app:10.1.0.0/16": ("", "br-app has no address of 10.1.0.0/16"),
    "br-app:172.30.0.0/29": ("", "br-app has too few addresses"),
    "br-app:172.30.0.0/24": ("ip link set br-app type bridge stp_state 1", "br-app has a spanning tree"),
    "br-+:172.30.0.0/24": ("ip link set vethc nomaster", "br-app has nothing attached to it now"),
}


@pytest.mark.parametrize("network", UNFIT)
def test_where_there_can_be_no_port_that_is_said(net: Net, container: str, network: str) -> None:
    command, why = UNFIT[network]
    assert container
    with net.inside(net.host):
        if command:
            run(command.split())
        tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES["nftables"], "--vnet", network, "--no-probe")
        fates, document = checked()
        assert not any("virtual" in name for name in fates)
        (said,) = document["notProbed"]
        assert said.startswith(f"virtual network {network}: {why}")
        assert devices() == []
        tpctl("uninstall")


def test_the_address_is_one_that_the_bridge_knows_nobody_at(net: Net, container: str) -> None:
    assert container
    with net.inside(net.host):
        taken = [str(one) for one in ip_network("172.30.0.128/25")][:-2]
        for address in taken[:-1]:
            run(["ip", "neighbour", "add", address, "lladdr", "02:00:00:00:00:01", "dev", BRIDGE])
        found = set()
        for _ in range(40):
            try:
                found |= {seat.ends.far for seat in bridged.seats(VirtualNetwork(BRIDGE, ip_network("172.30.0.0/24")))}
            except HostError as refused:
                assert "knows somebody at every address" in str(refused)  # noqa: PT017 - it is tried often
        assert found <= {ip_address(taken[-1]), ip_address("172.30.0.254")}
