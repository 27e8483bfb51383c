"""Options of the relay's sockets that need more than one call."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.settings.listen import MAX_KEEPALIVE, Keepalive

IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
"""linux/in.h, linux/in6.h."""


def keep_alive(sock: Socket, keepalive: Keepalive) -> None:
    """Set the TCP keep-alive of a socket. What is not given becomes the kernel's, whatever it was before."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, keepalive.on)
    for option, given, name, most in (
        (socket.TCP_KEEPIDLE, keepalive.idle, "tcp_keepalive_time", MAX_KEEPALIVE["idle"]),
        (socket.TCP_KEEPINTVL, keepalive.interval, "tcp_keepalive_intvl", MAX_KEEPALIVE["interval"]),
        (socket.TCP_KEEPCNT, keepalive.count, "tcp_keepalive_probes", MAX_KEEPALIVE["count"]),
    ):
        if keepalive.on:
            with contextlib.suppress(FileNotFoundError):  # /proc may show processes alone
                value = int(Path("/proc/sys/net/ipv4", name).read_text()) if given is None else given
                sock.setsockopt(socket.IPPROTO_TCP, option, min(value, most))


def is_transparent(sock: Socket) -> bool:
    """Whether a socket may have an address of somebody else. IPv4 and IPv6 share the flag."""
    return bool(sock.getsockopt(socket.SOL_IP, IP_TRANSPARENT))


def make_transparent(sock: Socket) -> None:
    """Let a socket have an address of somebody else. Needs CAP_NET_ADMIN or CAP_NET_RAW."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
