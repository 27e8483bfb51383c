"""Sockets that say who they are: listeners that answer with their seat, and the answers of a dial."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

from tpctl.spec.policy import Address, Family, Protocol

SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number at level SOL_IPV6."""
_IP_FREEBIND = 15
_IP_PKTINFO = 8
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78

QUERY = bytes.fromhex("7470 0100 0001 0000 0000 000005 7470 6374 6c 00 0001 0001")
"""A DNS query for the address of "tpctl" (RFC 1035, 4.1), so that a DNS proxy in between passes it on."""
_DNS_ANSWER = 0x80

AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
_WILDCARD = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}


@dataclass(frozen=True, slots=True, order=True)
class Seat:
    """Where a listener sits."""

    node: str
    port: int

    def __str__(self) -> str:
        return f"{self.node}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a dial."""

    outcome: str
    """"answered", or why not: "refused", "reset", "unreachable", "timeout"."""
    seat: Seat | None = None
    """Who answered."""
    original: tuple[Address, int] | None = None
    """TCP: the destination that SO_ORIGINAL_DST gave the listener; None when conntrack knew none."""
    name: tuple[Address, int] | None = None
    """TCP: the address that the accepted socket itself has."""
    source: Address | None = None
    """The client's address as the listener saw it."""
    direct: bool = True
    """Whether the listener saw the client's own port, that is, no proxy stood between them."""

    def __str__(self) -> str:
        return str(self.seat) if self.seat else self.outcome


@dataclass(slots=True)
class Listener:
    """An open listening (or, for UDP, receiving) socket and what it is."""

    seat: Seat
    protocol: Protocol
    family: Family
    socket: socket.socket


def new_socket(protocol: Protocol, family: Family) -> socket.socket:
    """A non-blocking socket of the current namespace and user."""
    made = socket.socket(AF[family], _KIND[protocol] | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if family is Family.IPV6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
    return made


def make_transparent(made: socket.socket, family: Family) -> None:
    """Let a socket use any address as its own, and take what TPROXY hands over. Needs root, whoever made the socket."""
    if family is Family.IPV6:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def listen(made: socket.socket, protocol: Protocol, family: Family, port: int) -> None:
    """Bind to the wildcard address, as redirection to an interface's own address needs, and listen."""
    if protocol is Protocol.TCP:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    elif family is Family.IPV6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    made.bind((_WILDCARD[family], port))
    if protocol is Protocol.TCP:
        made.listen(64)


def address_of(sockname: tuple[str, ...]) -> Address:
    """The address in what getpeername or recvmsg gave; the kernel writes a scope behind link-local ones."""
    return ipaddress.ip_address(sockname[0].partition("%")[0])


def original_destination(accepted: socket.socket, family: Family) -> tuple[Address, int] | None:
    """Where the client wanted to go, from conntrack."""
    level, size = (socket.IPPROTO_IP, 16) if family is Family.IPV4 else (socket.IPPROTO_IPV6, 28)
    try:
        raw = accepted.getsockopt(level, SO_ORIGINAL_DST, size)
    except OSError:
        return None
    (port,) = struct.unpack_from("!H", raw, 2)
    address = raw[4:8] if family is Family.IPV4 else raw[8:24]
    return ipaddress.ip_address(address), port


def named_in(datagram: bytes) -> str:
    """The seat in an answer."""
    return datagram[len(QUERY) :].decode()


def _answer_to(query: bytes, seat: Seat) -> bytes:
    return query[:2] + bytes([query[2] | _DNS_ANSWER]) + query[3 : len(QUERY)] + str(seat).encode()


def answer_datagram(listener: Listener) -> tuple[Address, int] | None:
    """Answer one query with the seat, from the address that was asked; hands back who asked."""
    try:
        query, ancillary, _, peer = listener.socket.recvmsg(2048, 256)
    except OSError:
        return None
    if len(query) < len(QUERY):
        return None
    control: list[tuple[int, int, bytes]] = []
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            # Answer from the header's destination; interface 0 leaves the choice to routing.
            control.append((level, kind, struct.pack("i", 0) + data[8:12] + bytes(4)))
        elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            scoped = ipaddress.IPv6Address(data[:16]).is_link_local
            control.append((level, kind, data[:16] + (data[16:20] if scoped else bytes(4))))
    try:
        listener.socket.sendmsg([_answer_to(query, listener.seat)], control, 0, peer)
    except OSError:
        return None
    return address_of(peer), int(peer[1])
