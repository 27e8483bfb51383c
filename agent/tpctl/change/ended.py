"""Connections that are over, while conntrack still remembers them and what was decided about them.

A SYN of the same addresses and ports may be taken for one of the connection that conntrack knows (tcp_packet() and
tcp_conntracks[] in net/netfilter/nf_conntrack_proto_tcp.c). NAT is not asked anew then: what was not redirected goes
past the data plane once more, and what was goes there although nothing is redirected any more. After a FIN of either
side that does not happen. It does

- when the server ended it with a RST, for ten seconds (nf_conntrack_tcp_timeout_close);
- when conntrack did not see the end: when nobody needed it meanwhile, as between an uninstall and the next install, or
  with the eBPF engine. For up to five days (nf_conntrack_tcp_timeout_established);
- when conntrack saw a single late packet of it, which it takes for the middle of a connection
  (nf_conntrack_tcp_loose): five minutes (nf_conntrack_tcp_timeout_unacknowledged).

So whoever changes what is redirected lets conntrack forget them. Connections that pass through this host are left
alone, as nobody here can tell whether they are over, and so are those in conntrack zones.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from functools import cache
from ipaddress import ip_address

from tpctl.host import conntrack, routes, sockets
from tpctl.host.conntrack import Entry, State
from tpctl.system import netlink
from tpctl.system.netlink import Netlink

_LIMIT_SECONDS = 3.0
"""An entry takes some tens of microseconds. What is left then goes by itself, sooner or later."""
_ADDRESS_BYTES = {socket.AF_INET: 4, socket.AF_INET6: 16}


def forget() -> int:
    """Let conntrack forget this host's connections that are over. Hands back how many; 0 if the kernel refuses."""
    try:
        # The sockets are looked at after the entries: a connection that has an entry and no socket later is over.
        suspects = [entry for entry in conntrack.entries() if _is_suspect(entry)]
        ended = list(_ended(suspects)) if suspects else []
    except OSError:
        return 0
    if not ended:
        return 0
    deadline = time.monotonic() + _LIMIT_SECONDS
    return sum(_forget(family, ended, deadline) for family in _ADDRESS_BYTES)


def _is_suspect(entry: Entry) -> bool:
    """Whether it could be over, and in the way."""
    return not entry.has_zone and (entry.state is State.CLOSE or not entry.is_translated)


def _ended(suspects: list[Entry]) -> Iterator[Entry]:
    running = sockets.connections()
    is_local = cache(_is_local)
    for entry in suspects:
        flow = entry.original
        over = entry.state is State.CLOSE or not {flow, flow.reversed()} & running
        if over and (is_local(flow.source) or is_local(flow.destination)):
            yield entry


def _is_local(packed: bytes) -> bool:
    """Whether rules take an address for this host's own; not when nobody can tell, for what runs must not be cut."""
    return routes.matches_local(ip_address(packed))


def _forget(family: socket.AddressFamily, ended: Sequence[Entry], deadline: float) -> int:
    """Those of a family that have not gone into another state since."""
    forgotten = 0
    with contextlib.suppress(OSError), Netlink(netlink.NETFILTER) as kernel:
        for entry in (entry for entry in ended if len(entry.original.source) == _ADDRESS_BYTES[family]):
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(FileNotFoundError):  # it has gone by itself
                forgotten += _forget_one(kernel, family, entry)
    return forgotten


def _forget_one(kernel: Netlink, family: socket.AddressFamily, entry: Entry) -> bool:
    request = conntrack.head(family) + netlink.attributes({conntrack.TUPLE_ORIG: conntrack.told(entry.original)})
    (found,) = list(kernel.ask(conntrack.GET, request)) or [b""]
    now = conntrack.read(found)
    if now is None or now.state is not entry.state:
        return False
    # With its id none is taken that has come in its place since the last line but two.
    number = netlink.attributes({conntrack.ID: conntrack.attributes_of(found)[conntrack.ID]})
    kernel.change(conntrack.DELETE, request + number)
    return True
