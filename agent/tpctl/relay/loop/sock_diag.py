"""Which socket of this host a connection has or would reach."""

from __future__ import annotations

import socket

from tpctl.host import sock_diag
from tpctl.host.sock_diag import Socket
from tpctl.relay.loop.original_destination import Destination


def is_connected(destination: Destination, client: tuple[str, int]) -> bool:
    """Whether this host has a connection of that very client to a destination. False if the kernel cannot be asked."""
    found = _asked(destination, client)
    return found is not None and found.is_connection


def connection(destination: Destination, client: tuple[str, int]) -> Socket | None:
    """The socket of this host that has a connection of that very client; None without one, or if none can be asked for.

    Raises OSError for what is no address.
    """
    found = _asked(destination, client)
    return found if found is not None and found.is_connection and found.tcp_info else None


def serves_every_address(destination: Destination) -> bool:
    """Whether what listens at a destination of this host listens at all of its addresses.

    False when nothing listens there, and when the kernel cannot be asked: not dialling is safe.
    """
    found = _asked(destination)
    return found is not None and found.listens_everywhere


def _asked(destination: Destination, client: tuple[str, int] | None = None) -> Socket | None:
    local = (socket.inet_pton(destination.family, destination.host), destination.port)
    remote = (socket.inet_pton(destination.family, client[0]), client[1]) if client else None
    return sock_diag.find(local, remote, scope=destination.scope)
