"""Connections that run, told to conntrack before rules come that would take their next segment for a first one.

kumactl's redirects are not limited to SYN. To a conntrack that does not know a connection each segment is the first
(nf_conntrack_tcp_loose, net/netfilter/nf_conntrack_proto_tcp.c), so its rules redirect the middle of it, and it is
reset. That happens where nobody needed conntrack before, as with the eBPF engine. An entry that says that both sides
have been seen is not asked for NAT any more (nf_nat_inet_fn(), net/netfilter/nf_nat_core.c).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Iterable, Iterator

from tpctl.change import ended
from tpctl.engines import leftovers
from tpctl.host import conntrack, sockets
from tpctl.host.conntrack import Flow
from tpctl.host.sockets import Ends
from tpctl.system import netlink
from tpctl.system.netlink import Netlink

_SEEN_REPLY, _ASSURED, _CONFIRMED = 1 << 1, 1 << 2, 1 << 3
"""enum ip_conntrack_status (include/uapi/linux/netfilter/nf_conntrack_common.h)."""
_ESTABLISHED_SECONDS = 432000
"""nf_conntrack_tcp_timeout_established, as the kernel has it; each segment renews it."""
_LIMIT_SECONDS = 10.0
"""An entry takes some tens of microseconds. Beyond that the connections of this host do not hold up the way back."""


@contextlib.contextmanager
def running_connections_known() -> Iterator[None]:
    """Let conntrack work for the length of the block, and know every TCP connection of this host from its beginning.

    The rules that come in the block keep it at work. As far as that goes: without nf_tables, or where the kernel takes
    no entries, nothing happens.

    A connection that ended while its entry was being made would be known for days, and the next one from the same port
    would be taken for it and go past the rules. So conntrack forgets what is over before the block is left.
    """
    with leftovers.conntrack_at_work():
        with contextlib.suppress(OSError):
            remember()
        yield
        ended.forget()


def remember() -> int:
    """Make entries for the connections that have none. Hands back how many were made. Raises OSError."""
    made = 0
    deadline = time.monotonic() + _LIMIT_SECONDS
    unknown = list(_unknown())
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        some = [ends for ends in unknown if len(ends.local) == size]
        made += _remember(family, some, deadline) if some else 0
    return made


def _unknown() -> Iterator[Ends]:
    """Connections of this host's sockets that conntrack does not know; of one between two of them, one end."""
    running = sockets.connections()  # before the entries: what begins after this is known
    known = {flow for entry in conntrack.entries() for flow in (entry.original, entry.reply)}
    for ends in running:
        there, back = Flow(*ends), Flow(*ends).reversed()
        if there not in known and back not in known:
            known.add(there)
            yield ends


def _remember(family: socket.AddressFamily, unknown: Iterable[Ends], deadline: float) -> int:
    made = 0
    with Netlink(netlink.NETFILTER) as kernel:
        for ends in unknown:
            if time.monotonic() > deadline:
                break
            try:
                kernel.change(conntrack.NEW, _entry(family, Flow(*ends)), netlink.CREATE | netlink.EXCLUSIVE)
                made += 1
            except OSError as error:
                if error.errno == errno.ETIMEDOUT:
                    raise
                # Conntrack has met it meanwhile, or has no room for more.
    return made


def _entry(family: socket.AddressFamily, flow: Flow) -> bytes:
    tcp = {conntrack.PROTOINFO_TCP_STATE: bytes([conntrack.State.ESTABLISHED])}
    return conntrack.head(family) + netlink.attributes(
        {
            conntrack.TUPLE_ORIG: conntrack.told(flow),
            conntrack.TUPLE_REPLY: conntrack.told(flow.reversed()),
            conntrack.TIMEOUT: struct.pack("!I", _ESTABLISHED_SECONDS),
            conntrack.STATUS: struct.pack("!I", _SEEN_REPLY | _ASSURED | _CONFIRMED),
            conntrack.PROTOINFO: {conntrack.PROTOINFO_TCP: tcp},
        }
    )
