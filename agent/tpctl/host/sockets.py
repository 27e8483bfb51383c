"""Which sockets listen on this host, on which address, for which user; and which connections there are."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from tpctl.host import holders, sock_diag
from tpctl.host.proc import read_net
from tpctl.host.routes import interface_name
from tpctl.spec.policy import Address, Protocol
from tpctl.system import text

_NO_CONNECTION = frozenset((sock_diag.TIME_WAIT, sock_diag.CLOSE, sock_diag.LISTEN, sock_diag.BOUND_INACTIVE))
_CONNECTION_STATES = sock_diag.ANY_STATE - sum(1 << state for state in _NO_CONNECTION)
_MAPPED = bytes(10) + b"\xff\xff"
_IDLE_STATE = {Protocol.TCP: sock_diag.LISTEN, Protocol.UDP: sock_diag.CLOSE}
_NUMBER = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Ends(NamedTuple):
    """A TCP connection as one of its sockets sees it. Addresses are packed, as socket.inet_pton makes them."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int


class Listener(NamedTuple):
    """A TCP socket that listens, or a UDP socket that takes datagrams from anyone."""

    protocol: Protocol
    address: Address
    port: int
    uid: int
    """Of the process that created the socket, which may have changed its user since."""
    inode: int
    v6only: bool = False
    """Whether one of IPv6 leaves IPv4 alone (IPV6_V6ONLY, ipv6(7))."""
    device: str | None = None
    """The interface it is bound to (SO_BINDTODEVICE, socket(7))."""
    transparent: bool | None = None
    """Whether it takes connections to addresses of others (IP_TRANSPARENT, ip(7)); None when that cannot be told."""
    cookie: int | None = None
    """The kernel's own number for it (SO_COOKIE, socket(7)); None when that cannot be told."""
    is_full: bool = False
    """Whether more connections wait to be accepted than may: the kernel drops new ones."""

    def takes(self, address: Address) -> bool:
        """Whether it is bound to `address` or to the wildcard, which for one of IPv6 may serve IPv4 as well."""
        if self.address.is_unspecified:
            return self.address.version == address.version or (self.address.version == 6 and not self.v6only)
        mapped = self.address.ipv4_mapped if isinstance(self.address, IPv6Address) else None
        return address in (self.address, mapped)


def listeners(protocol: Protocol) -> tuple[Listener, ...]:
    """Those of this network namespace, both families."""
    try:
        return tuple(_listeners(protocol))
    except OSError:  # a kernel without the modules of sock_diag(7)
        names = (str(protocol), f"{protocol}6")
        return tuple(one for name in names for one in parse_listeners(protocol, read_net(name)))


def _listeners(protocol: Protocol) -> Iterator[Listener]:
    states = 1 << _IDLE_STATE[protocol]
    for family in _FAMILIES:
        for found in sock_diag.dump(family, _NUMBER[protocol], states):
            yield Listener(
                protocol,
                ip_address(found.local),
                found.local_port,
                found.uid,
                found.inode,
                v6only=bool(found.v6only),
                device=(interface_name(found.device) or str(found.device)) if found.device else None,
                transparent=found.transparent,
                cookie=found.cookie,
                is_full=protocol is Protocol.TCP and found.queued > found.queue_limit,
            )


def at_ports(protocol: Protocol, ports: Collection[int]) -> tuple[sock_diag.Socket, ...]:
    """What has these ports of this host: sockets that listen there, and connections that they are the source port of.

    None where the kernel cannot be asked. It goes through the sockets of every network namespace to answer.
    """
    try:
        found = (one for family in _FAMILIES for one in sock_diag.dump(family, _NUMBER[protocol]))
        return tuple(one for one in found if one.local_port in ports)
    except OSError:
        return ()


def parse_listeners(protocol: Protocol, listing: str) -> Iterator[Listener]:
    """The listening sockets of /proc/net/{tcp,tcp6,udp,udp6} (proc_pid_net(5)); other lines are skipped."""
    for line in text.lines(listing)[1:]:
        fields = line.split()
        try:
            host, _, port = fields[1].partition(":")
            if int(fields[3], 16) == _IDLE_STATE[protocol]:
                yield Listener(protocol, _address(host), int(port, 16), int(fields[7]), int(fields[9]))
        except (IndexError, ValueError):
            continue


def _address(words: str) -> Address:
    packed = _packed(words)
    if len(packed) not in (4, 16):
        raise ValueError(words)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _packed(words: str) -> bytes:
    """An address as the kernel prints it: 32-bit words of network order bytes, each as a number of this machine."""
    return b"".join(struct.pack("=I", int(words[start : start + 8], 16)) for start in range(0, len(words), 8))


def parse_connections(listing: str) -> Iterator[Ends]:
    """The connections of /proc/net/{tcp,tcp6} that have not ended; an IPv4 one of an IPv6 socket is an IPv4 one."""
    for line in text.lines(listing)[1:]:
        fields = line.split(maxsplit=4)
        try:
            if int(fields[3], 16) in _NO_CONNECTION:
                continue
            (here, port), (there, their_port) = (fields[at].split(":") for at in (1, 2))
            local, remote = (_packed(host).removeprefix(_MAPPED) for host in (here, there))
            yield Ends(local, int(port, 16), remote, int(their_port, 16))
        except (IndexError, ValueError):
            continue


def owner_of(remote: bytes, port: int) -> int | None:
    """The uid of the socket of this network namespace that is connected to a packed address and port.

    None when there is none, or it still waits to be accepted, so that nobody has it.
    """
    for name in ("tcp", "tcp6"):
        for line in text.lines(read_net(name))[1:]:
            fields = line.split(maxsplit=10)
            try:
                host, _, there = fields[2].partition(":")
                if int(there, 16) == port and _packed(host).removeprefix(_MAPPED) == remote:
                    uid, inode = int(fields[7]), int(fields[9])
                    return uid if uid or inode else None
            except (IndexError, ValueError):
                continue
    return None


def connections() -> frozenset[Ends]:
    """Every TCP connection that a socket of this network namespace has, and that has not ended.

    The kernel is asked for those alone: with tens of thousands in TIME-WAIT, to read /proc/net/tcp takes seconds.
    """
    try:
        return frozenset(_connections())
    except OSError:  # a kernel without the modules of sock_diag(7)
        return frozenset(ends for name in ("tcp", "tcp6") for ends in parse_connections(read_net(name)))


def _connections() -> Iterator[Ends]:
    """An IPv4 one of an IPv6 socket is an IPv4 one."""
    for family in _FAMILIES:
        for found in sock_diag.dump(family, socket.IPPROTO_TCP, _CONNECTION_STATES):
            local, remote = (host.removeprefix(_MAPPED) for host in (found.local, found.remote))
            yield Ends(local, found.local_port, remote, found.remote_port)


def process_uid(inode: int) -> int | None:
    """The fsuid of a process that has the socket open, or None when none is found."""
    held = holders.processes([inode])[inode]
    return held[0].uid if held else None


def process_of(inode: int) -> int | None:
    """A process that has the socket open, or None when none is found."""
    return next((one.process for one in holders.holders([inode])), None)
