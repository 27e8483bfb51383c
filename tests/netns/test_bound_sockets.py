"""Connections of sockets that are bound to an interface: they reach the data plane, or nobody, but never the wire."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net
from tpctl.record import state

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
FAMILIES = (socket.AF_INET, socket.AF_INET6)
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
WILDCARD = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
UNICAST_IF = {socket.AF_INET: (socket.IPPROTO_IP, 50), socket.AF_INET6: (socket.IPPROTO_IPV6, 76)}
"""IP_UNICAST_IF and IPV6_UNICAST_IF: linux/in.h, linux/in6.h."""
PORT = 8080
LOST_SECONDS = 1.0


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        yield network


def tpctl(net: Net, *arguments: str, check: bool = True) -> str:
    with net.inside(net.host):
        done = lab.tpctl(*arguments, check=check)
    return done.stdout + done.stderr


def install(net: Net, engine: str) -> None:
    tpctl(net, "install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], "--redirect-all-dns-traffic")


def routes(net: Net) -> str:
    """The routes to loopback addresses."""
    listed = (net.on_host("ip", version, "route", "show", "table", "local") for version in ("-4", "-6"))
    return "".join(line for text in listed for line in text.splitlines(True) if "fe80::" not in line)


def bound(net: Net, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    with net.inside(net.host):
        made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    made.settimeout(relay_net.TIMEOUT)
    return made


def listening(net: Net, family: socket.AddressFamily) -> socket.socket:
    """The data plane's listener for DNS, made by its user, as its answers' conntrack zone takes for granted."""
    relay_net.LIBC.setfsuid(relay_net.RELAY_UID)
    try:
        with net.inside(net.host):
            made = socket.socket(family, socket.SOCK_DGRAM)
    finally:
        relay_net.LIBC.setfsuid(0)
    made.settimeout(relay_net.TIMEOUT)
    made.bind((WILDCARD[family], 15053))
    return made


def packets_to_loopback(sniffer: socket.socket) -> list[bytes]:
    """What the peer has seen of packets for loopback addresses until a packet to port 9 comes."""
    found = []
    while True:
        frame, (_, kind, *_rest) = sniffer.recvfrom(2000)
        ipv4 = kind == 0x0800
        to, protocol, port = (frame[16:20], frame[9], frame[22:24]) if ipv4 else (frame[24:40], frame[6], frame[42:44])
        if to in (socket.inet_aton("127.0.0.1"), bytes(15) + b"\1"):
            found.append(frame)
        if protocol == socket.IPPROTO_UDP and port == struct.pack("!H", 9):
            return found


@pytest.mark.parametrize("engine", ENGINES)
def test_through_the_relay(net: Net, tmp_path: Path, engine: str) -> None:
    before = routes(net)
    install(net, engine)
    servers = [relay_net.Server(net.listen(net.peer, (PEER[f], PORT)), relay_net.say_who("server")) for f in FAMILIES]
    with relay_net.relay(net, tmp_path, "--access-log") as running:
        for family in FAMILIES:
            with bound(net, family, socket.SOCK_STREAM) as client:
                client.connect((PEER[family], PORT))
                assert json.loads(relay_net.read_all(client)) == ["server", HOST[family], PEER[family], PORT]
            assert running.wait_for("connection", client=HOST[family])["listener"] == "outbound"
    for server in servers:
        server.close()
    assert "do not reach" not in tpctl(net, "status", check=False)
    tpctl(net, "uninstall")
    assert routes(net) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_dns_of_every_kind_of_binding(net: Net, engine: str) -> None:
    """The data plane's listener may be bound to the loopback address: that is where redirected queries go."""
    install(net, engine)
    index = struct.pack("!I", _index(net))
    for family in FAMILIES:
        with (
            net.datagram(net.host, family, (LOOPBACK[family], 15053)) as data_plane,
            bound(net, family, socket.SOCK_DGRAM) as first,
            net.datagram(net.host, family) as second,
        ):
            second.setsockopt(*UNICAST_IF[family], index)
            for client in (first, second):
                client.sendto(b"question", (PEER[family], 53))
                assert data_plane.recvfrom(100)[0] == b"question"


def test_any_listener_of_dns_can_answer(net: Net) -> None:
    """One that is bound to a wildcard address, and leaves the choice of the source to the kernel, answers as well.

    Whoever asks is connected, as the C library's resolver is, and takes no answer from elsewhere.
    """
    for engine in ENGINES:
        install(net, engine)
        for family in FAMILIES:
            with listening(net, family) as data_plane:
                for client in (bound(net, family, socket.SOCK_DGRAM), net.datagram(net.host, family)):
                    with client:
                        client.settimeout(relay_net.TIMEOUT)
                        client.connect((PEER[family], 53))
                        client.send(b"question")
                        question, asking = data_plane.recvfrom(100)
                        assert (question, asking[0]) == (b"question", LOOPBACK[family])
                        data_plane.sendto(b"answer", asking)
                        assert client.recv(100) == b"answer"
    tpctl(net, "uninstall")
    assert "15053" not in net.on_host("nft", "list", "ruleset") + net.on_host("iptables-legacy-save")


def _index(net: Net) -> int:
    with net.inside(net.host):
        return socket.if_nametoindex("eth0")


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_leaves_by_an_interface_that_does_not_lead_to_the_data_plane(net: Net, engine: str) -> None:
    install(net, engine)
    for version, family in (("-4", socket.AF_INET), ("-6", socket.AF_INET6)):
        route = routes_of(net, version)
        net.on_host("ip", version, "route", "del", *route, "table", "local")
        net.on_host("ip", version, "route", "add", "default", "via", PEER[family])
        net.on_host("ip", version, "neigh", "replace", LOOPBACK[family], "lladdr", "02:00:00:00:00:01", "dev", "eth0")
    with net.inside(net.peer):
        sniffer = relay_net.hearing("eth0", socket.SOCK_DGRAM)
    with sniffer:
        sniffer.settimeout(relay_net.TIMEOUT)
        for family in FAMILIES:
            with bound(net, family, socket.SOCK_STREAM) as client, bound(net, family, socket.SOCK_DGRAM) as asking:
                client.settimeout(LOST_SECONDS)
                with pytest.raises(OSError):
                    client.connect((PEER[family], PORT))
                with pytest.raises(OSError):
                    asking.sendto(b"question", (PEER[family], 53))
        with net.datagram(net.host, socket.AF_INET) as last:
            last.sendto(b"that was all", (PEER[socket.AF_INET], 9))
        assert packets_to_loopback(sniffer) == []
    assert "bound to eth0 do not reach the data plane" in tpctl(net, "status", check=False)
    question = ("explain", "outbound", "--to", f"{PEER[socket.AF_INET]}:80", "--uid", "1", "--bound-to", "eth0")
    assert "verdict: drop" in tpctl(net, *question)
    tpctl(net, "apply")
    assert "do not reach" not in tpctl(net, "status", check=False)
    assert "verdict: redirect to port 15001" in tpctl(net, *question)


def routes_of(net: Net, version: str) -> list[str]:
    listed = net.on_host("ip", version, "route", "show", "table", "local", "dev", "eth0").splitlines()
    address = "127.0.0.1" if version == "-4" else "::1"
    line = next(each for each in listed if f"local {address} " in each)
    return ["local", address, "dev", "eth0", "metric", line.split("metric ")[1].split()[0]]


def test_a_connection_that_runs_keeps_its_way_until_it_has_ended(net: Net, tmp_path: Path) -> None:
    before = routes(net)
    install(net, "nftables")
    server = relay_net.Server(net.listen(net.peer, (PEER[socket.AF_INET], PORT)), relay_net.echo)
    with relay_net.relay(net, tmp_path), bound(net, socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect((PEER[socket.AF_INET], PORT))
        tpctl(net, "uninstall")
        client.sendall(b"still there")
        assert client.recv(100) == b"still there"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    server.close()
    relay_net.until(lambda: tpctl(net, "status", check=False) and routes(net) == before)


def test_routes_of_others_and_a_second_install_and_uninstall_without_a_record(net: Net) -> None:
    net.on_host("ip", "route", "add", "local", "127.0.0.1", "dev", "eth0", "table", "local", "metric", "77")
    before = routes(net)
    install(net, "nftables")
    during = routes(net)
    install(net, "iptables nft")
    assert routes(net) == during != before
    with net.inside(net.host):
        state.clear()
    tpctl(net, "uninstall")
    assert routes(net) == before
