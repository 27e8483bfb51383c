"""What others' sockets still have to do with a cable whose probes are over.

The data plane's own: one that waits for the last part of a handshake, one that calls a destination which does not
answer. Without the cable their packets, sent again and again, would take the default route.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

from tpctl.host import sock_diag
from tpctl.spec.policy import Address

_NOT_LISTENING = sock_diag.ANY_STATE & ~(1 << sock_diag.LISTEN)
_MAPPED = bytes(10) + b"\xff\xff"


def end(addresses: Iterable[Address]) -> int:
    """End every TCP connection of this network namespace that has one of these addresses; hands back how many.

    They should be such that exist only for the probes. Does nothing where the kernel cannot do it.
    """
    wanted = {address.packed for address in addresses}
    ended = 0
    with contextlib.suppress(OSError):
        for family in (socket.AF_INET, socket.AF_INET6):
            for found in list(sock_diag.dump(family, socket.IPPROTO_TCP, _NOT_LISTENING)):
                # An IPv4 connection of an IPv6 socket is an IPv4 one.
                if not wanted.isdisjoint(each.removeprefix(_MAPPED) for each in (found.local, found.remote)):
                    with contextlib.suppress(OSError):
                        sock_diag.destroy(found)
                        ended += 1
    return ended
