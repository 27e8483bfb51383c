"""Ports of dials that the server has reset, kept from applications until conntrack has forgotten them.

conntrack remembers such a connection for ten seconds, and that it was not redirected (`agent.relay.dialling.OwnDial`).
An application that got its port meanwhile, towards the same server, would go past the relay. connect() chooses no port
that somebody has bound (net/ipv4/inet_hashtables.c, __inet_hash_connect), so it is bound.
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from agent.relay.loop import Loop

MOST = 512
"""Each takes a descriptor. Beyond that they are given back at once: the odds grow, and the relay goes on."""
_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close")
"""Of this network namespace, in seconds. Missing where conntrack is."""


class HeldPorts:
    """Those of one worker."""

    __slots__ = ("_held", "_loop")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held: set[socket.socket] = set()

    def hold(self, host: str, port: int) -> None:
        """Keep a port that has just become free. One that others use as well, or have taken, is left to them."""
        if len(self._held) >= MOST:
            return
        try:
            seconds = int(_TIMEOUT.read_text()) + 1.0
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except (OSError, ValueError):  # no conntrack, or out of descriptors
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may have it all the same
            sock.bind((host, port))
        except OSError:
            sock.close()
            return
        self._held.add(sock)
        self._loop.later(seconds, partial(self._give_back, sock))

    def _give_back(self, sock: socket.socket) -> None:
        self._held.discard(sock)
        sock.close()
