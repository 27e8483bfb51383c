"""Whether an accepted connection comes from this host."""

from __future__ import annotations

import socket
from typing import Any

from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.packet_info import LOOPBACK_INDEX

_IPV6_NAME = 4
"""Parts of the name of an IPv6 socket."""


def interface_of(connection: Socket) -> int:
    """The interface on which an accepted IPv6 connection arrived, also one of IPv4 on a dual-stack socket.

    The kernel notes it as that of the multicast option (mcast_oif, tcp_v6_syn_recv_sock() in net/ipv6/tcp_ipv6.c).
    Raises OSError when the connection has gone.
    """
    return connection.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF)


def is_from_this_host(connection: Socket, name: Any) -> bool:
    """Whether a connection came over lo, as what is redirected from this host always does. Raises OSError.

    `name` is what accept() returned: it shows the family, for which the socket module makes an enumeration each time.
    False for a connection to another address of this host, which nobody has redirected.
    """
    if not isinstance(name, tuple):
        return True
    if len(name) == _IPV6_NAME:
        return interface_of(connection) == LOOPBACK_INDEX
    return str(connection.getsockname()[0]).startswith("127.")
