"""Ports of dials that the server has reset, kept from applications until conntrack has forgotten them.

conntrack remembers such a connection for ten seconds, and that it was not redirected (`dialling.OwnDial`).
An application that got its port meanwhile, towards the same server, would go past the relay. connect() chooses no port
that somebody has bound (net/ipv4/inet_hashtables.c, __inet_hash_connect), so it is bound.
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from tpctl.relay.loop.descriptors import SPARE, unlimited
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.shares import Shares

MOST = 512
"""Each takes a descriptor. Beyond that they are given back at once: the odds grow, and the relay goes on."""
_PART = 16
_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close")
"""Of this network namespace, in seconds. Missing where conntrack is."""


class HeldPorts:
    """Those of one worker."""

    __slots__ = ("_descriptors", "_held", "_loop", "_most")

    def __init__(self, loop: Loop, descriptors: Shares | None = None) -> None:
        """`descriptors` that others need as well; they have a sixteenth of them at most."""
        self._loop = loop
        self._descriptors = descriptors or unlimited()
        self._most = min(MOST, self._descriptors.total // _PART)
        self._held: set[socket.socket] = set()

    def hold(self, host: str, port: int) -> None:
        """Keep a port that has just become free. One that others use as well, or have taken, is left to them."""
        if len(self._held) >= self._most or not self._descriptors.take(SPARE):
            return
        if not self._hold(host, port):
            self._descriptors.give(SPARE)

    def _hold(self, host: str, port: int) -> bool:
        try:
            seconds = int(_TIMEOUT.read_text()) + 1.0
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except (OSError, ValueError):  # no conntrack, or out of descriptors
            return False
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may have it all the same
            sock.bind((host, port))
        except OSError:
            sock.close()
            return False
        self._held.add(sock)
        self._loop.later(seconds, partial(self._give_back, sock))
        return True

    def _give_back(self, sock: socket.socket) -> None:
        self._held.discard(sock)
        sock.close()
        self._descriptors.give(SPARE)
