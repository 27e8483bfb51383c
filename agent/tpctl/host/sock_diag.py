"""The sockets of this network namespace, asked of the kernel: sock_diag(7), linux/inet_diag.h.

/proc/net/tcp does not tell whether a socket of IPv6 takes IPv4 as well, nor to which interface one is bound, nor
whether it is transparent. And to find one connection there means to read them all.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from tpctl.system import netlink

TIME_WAIT, CLOSE, LISTEN, BOUND_INACTIVE = 6, 7, 10, 13
"""include/net/tcp_states.h; a bound UDP socket that is not connected is in CLOSE. TCP_BOUND_INACTIVE (Linux 6.8) is
only told when it is asked for."""
ANY_STATE = (1 << 32) - 1

_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
"""SOCK_DIAG_BY_FAMILY, and SOCK_DESTROY (Linux 4.5, CONFIG_INET_DIAG_DESTROY); linux/sock_diag.h."""
_INFO = 2
_INFO_WANTED = 1 << (_INFO - 1)
_V6ONLY, _SOCKOPT = 11, 22
_TRANSPARENT = 0x20
"""INET_DIAG_INFO and others; `transparent` in struct inet_diag_sockopt (Linux 5.10), whose bits are counted from the
other end on a big-endian machine."""
_NO_COOKIE = 0xFFFFFFFFFFFFFFFF
_REQUEST = struct.Struct("=BBBBI")
_ID = struct.Struct("!HH16s16s")
_DEVICE_AND_COOKIE = struct.Struct("=III")
"""struct inet_diag_sockid: ports and addresses, and then these."""
_STATE = struct.Struct("=BBBB")
_REST = struct.Struct("=III4xIIII")
"""struct inet_diag_msg: idiag_if, both halves of the cookie, idiag_expires, and then idiag_rqueue, idiag_wqueue,
idiag_uid and idiag_inode."""
_FIXED = _STATE.size + _ID.size + _REST.size


class Socket(NamedTuple):
    """A socket of IPv4 or IPv6, over TCP or UDP."""

    family: int
    """AF_INET or AF_INET6."""
    state: int
    local: bytes
    """Packed, as socket.inet_pton makes it of the socket's family."""
    local_port: int
    remote: bytes
    remote_port: int
    device: int
    """The index of the interface it is bound to, 0 for none."""
    queued: int
    """Of one that listens: how many connections wait to be accepted."""
    queue_limit: int
    uid: int
    """Who made it."""
    inode: int
    cookie: int
    """The kernel's own number for it (SO_COOKIE, socket(7))."""
    v6only: bool | None
    """None where it means nothing, and where the kernel does not tell."""
    transparent: bool | None
    """IP_TRANSPARENT (ip(7)); None where the kernel does not tell."""
    tcp_info: bytes
    """linux/tcp.h, struct tcp_info, if it was asked for; empty for a connection that has ended."""

    @property
    def listens_everywhere(self) -> bool:
        """Whether it listens, and at every address of its family."""
        return self.state == LISTEN and not any(self.local)

    @property
    def is_connection(self) -> bool:
        """Whether it is one of a connection that has not ended: a SYN opens one anew that has."""
        return self.state not in (LISTEN, TIME_WAIT)


def dump(family: int, protocol: int, states: int = ANY_STATE) -> Iterator[Socket]:
    """Every socket of a family and protocol (IPPROTO_TCP, IPPROTO_UDP) in any of the states, given as bits.

    Raises OSError where the kernel cannot tell (it may lack the modules tcp_diag and udp_diag).
    """
    body = _REQUEST.pack(family, protocol, 0, 0, states) + _identity((b"", 0), (b"", 0))
    with netlink.Netlink(_SOCK_DIAG) as kernel:
        for message in kernel.ask(_BY_FAMILY, body, netlink.DUMP):
            if found := parse(message):
                yield found


def find(local: tuple[bytes, int], remote: tuple[bytes, int] | None = None, *, scope: int = 0) -> Socket | None:
    """The TCP socket that a segment from `remote`, or from nobody in particular, to `local` would reach.

    `scope` is the index of an interface. None when there is no such socket, and when the kernel cannot be asked.
    """
    family = socket.AF_INET if len(local[0]) == 4 else socket.AF_INET6
    identity = _identity(local, remote or (b"", 0), scope)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, _INFO_WANTED, 0, ANY_STATE) + identity
    try:
        with netlink.Netlink(_SOCK_DIAG) as kernel:
            return next((found for message in kernel.ask(_BY_FAMILY, body) if (found := parse(message))), None)
    except OSError:
        return None


def destroy(found: Socket) -> None:
    """End a TCP connection, whosever it is: both ends are reset. Raises OSError where the kernel cannot or may not."""
    ends = (found.local, found.local_port), (found.remote, found.remote_port)
    identity = _identity(*ends, found.device, found.cookie)
    with netlink.Netlink(_SOCK_DIAG) as kernel:
        kernel.change(_DESTROY, _REQUEST.pack(found.family, socket.IPPROTO_TCP, 0, 0, ANY_STATE) + identity)


def _identity(local: tuple[bytes, int], remote: tuple[bytes, int], device: int = 0, cookie: int = _NO_COOKIE) -> bytes:
    # The kernel calls our side the source: `idiag_src` is where the connection arrives (net/ipv4/inet_diag.c).
    ends = _ID.pack(local[1], remote[1], local[0], remote[0])
    return ends + _DEVICE_AND_COOKIE.pack(device, cookie & 0xFFFFFFFF, cookie >> 32)


def parse(message: bytes) -> Socket | None:
    """The socket that a struct inet_diag_msg and the attributes behind it describe; None for what is too short.

    >>> parse(b"")
    """
    if len(message) < _FIXED:
        return None
    family, state, _, _ = _STATE.unpack_from(message)
    local_port, remote_port, local, remote = _ID.unpack_from(message, _STATE.size)
    device, low, high, queued, limit, uid, inode = _REST.unpack_from(message, _STATE.size + _ID.size)
    size = 4 if family == socket.AF_INET else 16
    found = netlink.parse(message[_FIXED:])
    return Socket(
        family, state, local[:size], local_port, remote[:size], remote_port, device, queued, limit, uid, inode,
        low | high << 32, _bit(found.get(_V6ONLY), 0xFF),
        _bit(found.get(_SOCKOPT), _transparent_bit()), found.get(_INFO, b""),
    )  # fmt: skip


def _transparent_bit() -> int:
    return _TRANSPARENT if sys.byteorder == "little" else 0x80 // _TRANSPARENT


def _bit(value: bytes | None, mask: int) -> bool | None:
    return bool(value[0] & mask) if value else None
