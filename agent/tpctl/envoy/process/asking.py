"""Whether somebody answers DNS, by asking."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Sequence

from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import ListenerSettings
from tpctl.system.child import ChildFailedError, in_child
from tpctl.system.errors import TpctlError

_SECONDS = {socket.SOCK_DGRAM: (1.0, 1.0, 3.0), socket.SOCK_STREAM: (5.0,)}
"""For the answers to so many tries: a datagram may be lost where the kernel has no room for it."""
_HEADER = b"\x01\0" + bytes(8)
"""Behind the id: a query without a question, which the relay answers itself (FORMERR)."""
_MOST_BYTES = 512
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def where_to_ask(listener: ListenerSettings) -> str | None:
    """The address at which a listener can be asked on this host; None where it would not answer."""
    address = listener.listen.address
    assert isinstance(address, Destination)
    if listener.listen.is_wildcard:
        family = socket.AF_INET6 if address.family == socket.AF_INET6 and listener.listen.ipv6only else socket.AF_INET
        address = Destination(_LOOPBACK[family], address.port, family)
    # Whoever asks one of this host's addresses does so from the same one.
    return show(address) if listener.access.admits(address.host) else None


def silent(addresses: Sequence[Destination], uid: int) -> list[str]:
    """Which addresses do not answer, and over what. Asked as a user: the rules let nobody else (g1).

    Raises TpctlError when that cannot be tried.
    """

    def attempt() -> str:
        if uid != os.geteuid():
            os.setgroups([])
            os.setresuid(uid, uid, uid)
        return "\n".join(f"{show(one)} over {how}" for one in addresses for how in _silent(one))

    seconds = 5.0 + sum(map(sum, _SECONDS.values())) * len(addresses)
    try:
        return in_child(attempt, seconds=seconds, what="DNS was not asked", why="the machine is busy").splitlines()
    except ChildFailedError as error:
        raise TpctlError(f"DNS cannot be asked: {error}") from error


def _silent(address: Destination) -> Iterator[str]:
    for kind, how in ((socket.SOCK_DGRAM, "UDP"), (socket.SOCK_STREAM, "TCP")):
        if not any(_answers(address, kind, seconds) for seconds in _SECONDS[kind]):
            yield how


def _answers(address: Destination, kind: socket.SocketKind, seconds: float) -> bool:
    query = secrets.token_bytes(2) + _HEADER
    try:
        with socket.socket(address.family, kind) as sock:
            sock.settimeout(seconds)
            sock.connect(address.sockaddr)
            if kind is socket.SOCK_STREAM:
                sock.sendall(len(query).to_bytes(2, "big") + query)
                return sock.recv(_MOST_BYTES)[2:4] == query[:2]
            sock.send(query)
            return sock.recv(_MOST_BYTES)[:2] == query[:2]
    except OSError:
        return False
