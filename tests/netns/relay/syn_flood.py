"""SYNs whose senders never answer: each one leaves a half-open connection behind, as far as the kernel lets it."""

from __future__ import annotations

import socket
import struct

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net

NETWORK = {socket.AF_INET: "198.18.0.0/15", socket.AF_INET6: "2001:db8:5::/48"}
"""Where the SYNs say that they come from; nobody there answers."""
_PREFIX = {socket.AF_INET: bytes((198, 18)), socket.AF_INET6: socket.inet_pton(socket.AF_INET6, "2001:db8:5::")[:14]}
_SYN, _WINDOW = 0x02, 64240
_TCP = struct.Struct("!HHIIBBHHH")


def prepare(net: Net) -> None:
    """Let answers to those addresses leave our host, and get lost at the peer."""
    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}")
    relay_net.run(*on_peer, "sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
    for family, network in NETWORK.items():
        version = "-6" if family == socket.AF_INET6 else "-4"
        relay_net.run("ip", "-n", net.host, version, "route", "replace", network, "via", PEER[family])


def flood(net: Net, family: socket.AddressFamily, port: int, count: int) -> None:
    """Send so many SYNs from the peer to a port of our host, each from another address and port."""
    with net.inside(net.peer):
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)  # it brings its own IP header (raw(7))
    to = HOST[family]
    target = socket.inet_pton(family, to)
    with raw:
        for number in range(count):
            source = _PREFIX[family] + (number & 0xFFFF).to_bytes(2, "big")
            raw.sendto(_packet(family, source, target, 1024 + number % 60000, port), (to, 0))


def _packet(family: int, source: bytes, target: bytes, source_port: int, port: int) -> bytes:
    tcp = _TCP.pack(source_port, port, source_port * 7919, 0, 5 << 4, _SYN, _WINDOW, 0, 0)
    checksum = _checksum(source + target + struct.pack("!II", len(tcp), socket.IPPROTO_TCP) + tcp)
    tcp = tcp[:16] + checksum.to_bytes(2, "big") + tcp[18:]
    if family == socket.AF_INET:
        # The kernel fills in length and checksum of the header.
        return struct.pack("!BBHHHBBH", 0x45, 0, 0, 1, 0, 64, socket.IPPROTO_TCP, 0) + source + target + tcp
    return struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + source + target + tcp


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return int(~(total + (total >> 16)) & 0xFFFF)
