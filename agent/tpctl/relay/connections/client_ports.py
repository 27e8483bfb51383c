"""Source ports for dialling in a client's name, and for clients of this host that have a privileged one.

The client's own connection and the one that the relay dials for it run between the same two addresses. With the same
port of the client, the kernel would take segments of one for the other's: the relay's SYN would reach a connection that
it has itself accepted, and end it. So the port is looked up before it is used, and it comes from where clients seldom
have theirs: below 32768, from where Linux chooses, and 49152, from where others do (RFC 6335).
"""

from __future__ import annotations

import errno
import random
import socket

from tpctl.relay.connections.socket_options import make_transparent
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.loop.sock_diag import is_connected

_PORTS = range(1024, 32768)
PRIVILEGED = range(1, 1024)
_CLIENTS_PRIVILEGED = range(512, 1024)
"""Below them are the services that everybody knows; bindresvport(3) chooses there, too."""
SOCKETS = 8
"""How many are worth trying: each of them finds a port that the client has with the odds of its connections to all."""
_TRIES = 64
"""A port may be taken by a connection that ended within the last minute (TIME_WAIT)."""


class NoPortError(OSError):
    """The port that was bound is one of the client's own: another socket has to be tried."""


def bind(sock: Socket, host: str, destination: Destination) -> None:
    """Give a socket a client's address, and a port that the client does not have towards the destination.

    Raises NoPortError when another socket may have more luck, OSError when the kernel refuses.
    """
    make_transparent(sock)
    for left in reversed(range(_TRIES)):
        port = random.choice(_PORTS)  # noqa: S311 - nothing secret
        try:
            sock.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not left:
                raise
        else:
            break
    if is_connected(destination, (host, port)):
        raise NoPortError(errno.EADDRNOTAVAIL, "the client has a connection of the same port")


def bind_privileged(sock: Socket) -> None:
    """Give a socket a port below 1024, if this process may; else the kernel chooses at connect()."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of ended connections (TIME_WAIT) will do
    for port in random.sample(_CLIENTS_PRIVILEGED, _TRIES):
        try:
            sock.bind(("", port))
        except PermissionError:
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
