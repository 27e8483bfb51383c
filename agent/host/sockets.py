"""Which sockets listen on this host, on which address, for which user; and which connections there are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from agent.host.proc import read_net
from agent.policy import Address, Protocol

_TCP_LISTEN = 0x0A
_UDP_UNCONNECTED = 0x07
"""TCP_LISTEN and TCP_CLOSE (net/tcp_states.h); a bound UDP socket that is not connected is in the latter."""
_NO_CONNECTION = frozenset((0x06, 0x07, _TCP_LISTEN))
"""TIME_WAIT, CLOSE, LISTEN."""
_MAPPED = bytes(10) + b"\xff\xff"
_IDLE_STATE = {Protocol.TCP: _TCP_LISTEN, Protocol.UDP: _UDP_UNCONNECTED}


class Ends(NamedTuple):
    """A TCP connection as one of its sockets sees it. Addresses are packed, as socket.inet_pton makes them."""

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket that listens, or a UDP socket that takes datagrams from anyone."""

    protocol: Protocol
    address: Address
    port: int
    uid: int
    """Of the process that created the socket, which may have changed its user since."""
    inode: int

    def takes(self, address: Address) -> bool:
        """Whether it is bound to `address` or to the wildcard; `::` is taken to serve IPv4 as well."""
        if self.address.is_unspecified:
            return self.address.version in (6, address.version)
        mapped = self.address.ipv4_mapped if isinstance(self.address, IPv6Address) else None
        return address in (self.address, mapped)


def parse_listeners(protocol: Protocol, text: str) -> Iterator[Listener]:
    """The listening sockets of /proc/net/{tcp,tcp6,udp,udp6} (proc_pid_net(5)); other lines are skipped."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        try:
            host, _, port = fields[1].partition(":")
            if int(fields[3], 16) == _IDLE_STATE[protocol]:
                yield Listener(protocol, _address(host), int(port, 16), int(fields[7]), int(fields[9]))
        except (IndexError, ValueError):
            continue


def _address(text: str) -> Address:
    packed = _packed(text)
    if len(packed) not in (4, 16):
        raise ValueError(text)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _packed(text: str) -> bytes:
    """An address as the kernel prints it: 32-bit words of network order bytes, each as a number of this machine."""
    return b"".join(struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8))


def parse_connections(text: str) -> Iterator[Ends]:
    """The connections of /proc/net/{tcp,tcp6} that have not ended; an IPv4 one of an IPv6 socket is an IPv4 one."""
    for line in text.splitlines()[1:]:
        fields = line.split(maxsplit=4)
        try:
            if int(fields[3], 16) in _NO_CONNECTION:
                continue
            (here, port), (there, their_port) = (fields[at].split(":") for at in (1, 2))
            local, remote = (_packed(host).removeprefix(_MAPPED) for host in (here, there))
            yield Ends(local, int(port, 16), remote, int(their_port, 16))
        except (IndexError, ValueError):
            continue


def connections() -> frozenset[Ends]:
    """Every TCP connection that a socket of this network namespace has, and that has not ended."""
    return frozenset(ends for name in ("tcp", "tcp6") for ends in parse_connections(read_net(name)))


def listeners(protocol: Protocol) -> tuple[Listener, ...]:
    """Those of this network namespace, both families."""
    return tuple(
        listener for name in (str(protocol), f"{protocol}6") for listener in parse_listeners(protocol, read_net(name))
    )


def process_uid(inode: int) -> int | None:
    """The fsuid of a process that has the socket open, or None when none is found (that takes root, in general).

    A daemon that binds port 53 as root and then drops its privileges opens its later sockets as another user than the
    one /proc/net/udp shows.
    """
    process = process_of(inode)
    try:
        status = Path("/proc", str(process), "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return _fsuid(status)


def process_of(inode: int) -> int | None:
    """A process that has the socket open, or None when none is found."""
    wanted = f"socket:[{inode}]"
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(descriptor.readlink()) == wanted for descriptor in (directory / "fd").iterdir()):
                return int(directory.name)
        except OSError:
            continue
    return None


def _fsuid(status: str) -> int | None:
    for line in status.splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[4])
    return None
