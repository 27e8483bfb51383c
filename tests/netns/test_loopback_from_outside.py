"""What arrives from another host or a container for a loopback address is left to the kernel, which drops it (l1).

NAT stands before the kernel's test for such packets, so a redirect would hand services of 127.0.0.1 to the whole link.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, PEER4, PEER6, Net
from tests.netns.test_envoy import running_envoy

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
WAYS = {
    "inbound": (),
    "container": ("--vnet", "eth0:10.200.0.0/24", "--vnet", "eth0:fd20::/64"),
    "tproxy": ("--inbound-mode", "tproxy"),
}
PORT = 7777
REFUSED_SECONDS = 1.0
ETHERNET_IPV4, ETHERNET_IPV6 = 0x0800, 0x86DD
SYN, SYN_ACK = 0x02, 0x12


@pytest.fixture
def net() -> Iterator[Net]:
    """Our host, and a peer that sends to 127.0.0.1 by the wire."""
    with relay_net.network(redirect=False, passthrough6=False) as network:
        local(network, network.host, "0")
        local(network, network.peer, "1")
        relay_net.run("ip", "-n", network.peer, "addr", "del", "127.0.0.1/8", "dev", "lo")
        via = ("via", HOST4, "dev", "eth0", "src", PEER4)
        relay_net.run("ip", "-n", network.peer, "route", "add", "127.0.0.1/32", *via)
        yield network


def local(net: Net, name: str, value: str) -> None:
    """Whether a host's eth0 may carry addresses of 127.0.0.0/8 (ip-sysctl, route_localnet)."""
    names = [f"net.ipv4.conf.{each}.{what}" for each in ("all", "eth0") for what in ("route_localnet", "rp_filter")]
    values = [value if each.endswith("localnet") else "0" for each in names]
    pairs = [f"{each}={one}" for each, one in zip(names, values, strict=True)]
    relay_net.run("nsenter", f"--net=/run/netns/{name}", "sysctl", "-qw", *pairs)


def install(net: Net, engine: str, *flags: str) -> None:
    with net.inside(net.host):
        lab.tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], *flags)


@contextlib.contextmanager
def service(net: Net) -> Iterator[relay_net.Server]:
    server = relay_net.Server(net.listen(net.host, ("127.0.0.1", PORT)), relay_net.say_who("loopback only"))
    try:
        yield server
    finally:
        server.close()


def answer(net: Net, seconds: float = relay_net.TIMEOUT) -> object:
    """What the peer is told at 127.0.0.1; None when nobody answers."""
    with net.inside(net.peer):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with client:
        client.settimeout(seconds)
        try:
            client.connect(("127.0.0.1", PORT))
            return json.loads(relay_net.read_all(client) or b"null")
        except OSError:
            return None


def check(net: Net) -> None:
    """Without the kernel's leave nobody answers; with it, the service does, and no data plane stands between."""
    with service(net) as served:
        assert answer(net, REFUSED_SECONDS) is None
        assert served.peers == []
        local(net, net.host, "1")
        assert answer(net) == ["loopback only", PEER4, "127.0.0.1", PORT]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_through_the_relay(net: Net, tmp_path: Path, engine: str, way: str) -> None:
    install(net, engine, *WAYS[way])
    flags = ("--transparent",) if way == "tproxy" else ()
    with relay_net.relay(net, tmp_path, *flags):
        check(net)


@pytest.mark.parametrize("way", ["inbound", "container"])
def test_through_envoy(net: Net, tmp_path: Path, way: str) -> None:
    install(net, "nftables", *WAYS[way])
    with running_envoy(net, tmp_path / "envoy.log"):
        check(net)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_service_address_on_lo_is_redirected_all_the_same(net: Net, tmp_path: Path, engine: str) -> None:
    """An address that routers announce (anycast) stands on lo, and others may reach it."""
    relay_net.run("ip", "-n", net.host, "addr", "add", "192.0.2.99/32", "dev", "lo", "scope", "host")
    relay_net.run("ip", "-n", net.peer, "route", "add", "192.0.2.99/32", "via", HOST4)
    install(net, engine)
    served = relay_net.Server(net.listen(net.host, ("192.0.2.99", 8080)), relay_net.say_who("application"))
    with relay_net.relay(net, tmp_path), net.connect(net.peer, ("192.0.2.99", 8080)) as client:
        assert json.loads(relay_net.read_all(client)) == ["application", "127.0.0.6", "192.0.2.99", 8080]
    served.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_containers_dns_to_a_loopback_address(net: Net, engine: str) -> None:
    """v1 does not take it either: the one that answers 127.0.0.1:53 is asked, once the kernel allows that."""
    install(net, engine, "--redirect-all-dns-traffic", *WAYS["container"])
    local(net, net.host, "1")
    with (
        net.datagram(net.host, socket.AF_INET, ("127.0.0.1", 53)) as server,
        net.datagram(net.host, socket.AF_INET, ("0.0.0.0", 15053)) as data_plane,
        net.datagram(net.peer, socket.AF_INET) as client,
    ):
        client.sendto(b"question", ("127.0.0.1", 53))
        question, asker = server.recvfrom(100)
        assert question == b"question"
        server.sendto(b"answer", asker)
        assert client.recvfrom(100) == (b"answer", ("127.0.0.1", 53))
        data_plane.setblocking(False)
        with pytest.raises(BlockingIOError):
            data_plane.recv(100)


OTHER_WORDS = ("0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")
"""What connect(2) takes for a loopback address, and a data plane would dial: no socket sends that to another host."""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_container_that_writes_its_packets_itself(net: Net, engine: str) -> None:
    install(net, engine, *WAYS["container"])
    with (
        net.listen(net.host, ("0.0.0.0", 15001)),
        net.listen(net.host, ("::", 15001)),
        wire(net) as sniffer,
    ):
        for number, address in enumerate((*OTHER_WORDS, "203.0.113.9", "2001:db8:9::9")):
            sniffer.syn(address, 40000 + number)
        answered = {sniffer.answered() for _ in range(2)}
    assert answered == {"203.0.113.9", "2001:db8:9::9"}


class Wire:
    """The peer's end of the link: segments are written and read as they are."""

    def __init__(self, net: Net) -> None:
        with net.inside(net.peer):
            self.socket = relay_net.hearing("eth0", socket.SOCK_RAW)
        self.socket.settimeout(relay_net.TIMEOUT)
        own = self.socket.getsockname()[4]
        with net.inside(net.host), socket.socket() as asking:
            far = fcntl.ioctl(asking, 0x8927, struct.pack("256s", b"eth0"))[18:24]  # SIOCGIFHWADDR
        self.ethernet = far + own

    def syn(self, to: str, source_port: int) -> None:
        """Send the first segment of a connection to port 7777 of an address."""
        destination = ipaddress.ip_address(to)
        ipv4 = destination.version == 4
        source = ipaddress.ip_address(PEER4 if ipv4 else PEER6)
        head = struct.pack("!HHIIBBHHH", source_port, PORT, 1, 0, 5 << 4, SYN, 1024, 0, 0)
        ends = source.packed + destination.packed
        pseudo = ends + (struct.pack("!HH", 6, 20) if ipv4 else struct.pack("!II", 20, 6))
        segment = head[:16] + struct.pack("!H", lab.checksum(pseudo + head)) + head[18:]
        if ipv4:
            header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + ends
            header = header[:10] + struct.pack("!H", lab.checksum(header)) + header[12:]
            self.socket.send(self.ethernet + struct.pack("!H", ETHERNET_IPV4) + header + segment)
        else:
            header = struct.pack("!IHBB", 6 << 28, 20, 6, 64) + ends
            self.socket.send(self.ethernet + struct.pack("!H", ETHERNET_IPV6) + header + segment)

    def answered(self) -> str:
        """The address that the next SYN-ACK comes from."""
        while True:
            frame = self.socket.recv(2000)
            kind, packet = struct.unpack("!H", frame[12:14])[0], frame[14:]
            if kind == ETHERNET_IPV4 and packet[9] == 6 and packet[33] == SYN_ACK:
                return str(ipaddress.ip_address(packet[12:16]))
            if kind == ETHERNET_IPV6 and packet[6] == 6 and packet[53] == SYN_ACK:
                return str(ipaddress.ip_address(packet[8:24]))


@contextlib.contextmanager
def wire(net: Net) -> Iterator[Wire]:
    made = Wire(net)
    try:
        yield made
    finally:
        made.socket.close()
