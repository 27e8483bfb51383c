"""Where a redirected connection was going before the kernel changed its destination."""

from __future__ import annotations

import errno
import socket
import struct
from functools import lru_cache
from typing import NamedTuple

from tpctl.relay.loop.arrival import interface_of
from tpctl.relay.loop.bare_socket import Socket

SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv4.h; an option of SOL_IP."""
IP6T_SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv6/ip6_tables.h; an option of SOL_IPV6."""

_SOCKADDR_IN = struct.Struct("=H2s4s8x")
_SOCKADDR_IN6 = struct.Struct("=H2sI16sI")
_LINK_LOCAL = ("fe8", "fe9", "fea", "feb")
_MAPPED_TEXT = "::ffff:"
_MAPPED_SIZE = len(_MAPPED_TEXT)
_MAPPED_BYTES = b"\0" * 10 + b"\xff\xff"

_REMEMBERED = 4096
"""Destinations: connections to the same one share it."""

_NOT_TRANSLATED = (errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
"""conntrack does not know the connection, or is not even loaded: nobody translated its destination."""


class Destination(NamedTuple):
    """An address and port to dial. IPv4 is always in its own form, never mapped into IPv6."""

    host: str
    port: int
    family: int = socket.AF_INET
    scope: int = 0
    """The interface index of a link-local IPv6 address, else 0."""

    @property
    def sockaddr(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """The form that connect() and bind() take."""
        if self.family == socket.AF_INET:
            return (self.host, self.port)
        return (self.host, self.port, 0, self.scope)

    @property
    def is_link_local(self) -> bool:
        """Whether it is an IPv6 address that means nothing without its interface, fe80::/10."""
        return self.family == socket.AF_INET6 and self.host[:3] in _LINK_LOCAL

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.family == socket.AF_INET else f"[{self.host}]:{self.port}"


def is_mapped(host: str) -> bool:
    """Whether a host as the socket module shows it is an IPv4 address mapped into IPv6 (::ffff:192.0.2.1)."""
    return host.startswith(_MAPPED_TEXT) and "." in host


def unmapped(host: str) -> str:
    """`host` without the prefix that an IPv4 address has on a dual-stack socket."""
    return host[_MAPPED_SIZE:] if host.startswith(_MAPPED_TEXT) and "." in host else host


@lru_cache(maxsize=_REMEMBERED)
def parse_ipv4(raw: bytes) -> Destination:
    """The destination in a struct sockaddr_in. Raises ValueError when it is none."""
    if len(raw) != _SOCKADDR_IN.size:
        raise ValueError(f"a sockaddr_in has {_SOCKADDR_IN.size} bytes, not {len(raw)}")
    family, port, address = _SOCKADDR_IN.unpack(raw)
    if family != socket.AF_INET:
        raise ValueError(f"address family {family} is not AF_INET")
    return Destination(socket.inet_ntop(socket.AF_INET, address), int.from_bytes(port, "big"))


@lru_cache(maxsize=_REMEMBERED)
def parse_ipv6(raw: bytes) -> Destination:
    """The destination in a struct sockaddr_in6. Raises ValueError when it is none."""
    if len(raw) != _SOCKADDR_IN6.size:
        raise ValueError(f"a sockaddr_in6 has {_SOCKADDR_IN6.size} bytes, not {len(raw)}")
    family, port, _flow, address, scope = _SOCKADDR_IN6.unpack(raw)
    if family != socket.AF_INET6:
        raise ValueError(f"address family {family} is not AF_INET6")
    number = int.from_bytes(port, "big")
    if address.startswith(_MAPPED_BYTES):
        return Destination(socket.inet_ntop(socket.AF_INET, address[-4:]), number)
    return Destination(socket.inet_ntop(socket.AF_INET6, address), number, socket.AF_INET6, scope)


def from_socket_name(name: tuple[str, int] | tuple[str, int, int, int]) -> Destination:
    """The destination in what getsockname() returns for an IPv4 or IPv6 socket."""
    host, port = name[0], name[1]
    if ":" not in host or is_mapped(host):
        return Destination(unmapped(host), port)
    return Destination(host.partition("%")[0], port, socket.AF_INET6, name[3] if len(name) == 4 else 0)


def recover(connection: Socket, peer_host: str) -> Destination:
    """Where the client of an accepted connection wanted to go; `peer_host` is its address as accept() returned it.

    A connection that nobody redirected was going to the address it arrived at: a direct hit on the listener, TPROXY,
    or a socket lookup program. Raises OSError when the connection is already gone.
    """
    found = _recover(connection, peer_host)
    if found.is_link_local and not found.scope:
        # The kernel names the interface of link-local addresses only if the client's is one too.
        return found._replace(scope=interface_of(connection))
    return found


def _recover(connection: Socket, peer_host: str) -> Destination:
    try:
        # The kernel keeps the two families' translations apart, and a dual-stack socket has connections of both.
        if ":" not in peer_host or is_mapped(peer_host):
            return parse_ipv4(connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, _SOCKADDR_IN.size))
        return parse_ipv6(connection.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, _SOCKADDR_IN6.size))
    except OSError as error:
        if error.errno not in _NOT_TRANSLATED:
            raise
        return from_socket_name(connection.getsockname())
