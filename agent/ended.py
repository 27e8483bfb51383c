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
from ipaddress import ip_address
from typing import Any

from agent.host import conntrack, interfaces, sockets
from agent.host.conntrack import Entry, Flow, State

_LIMIT_SECONDS = 3.0
"""An entry takes a millisecond. What is left then goes by itself, sooner or later."""
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
    local = interfaces.local_networks()
    for entry in suspects:
        flow = entry.original
        if (entry.state is State.CLOSE or not {flow, flow.reversed()} & running) and any(
            ip_address(address) in network for address in (flow.source, flow.destination) for network in local
        ):
            yield entry


def _forget(family: socket.AddressFamily, ended: Sequence[Entry], deadline: float) -> int:
    """Those of a family that have not gone into another state since."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    forgotten = 0
    with contextlib.suppress(OSError), NFCTSocket(nfgen_family=family) as netlink:
        for entry in (entry for entry in ended if len(entry.original.source) == _ADDRESS_BYTES[family]):
            if time.monotonic() > deadline:
                break
            wanted = _wanted(family, entry.original)
            with contextlib.suppress(NetlinkError):  # it has gone by itself
                for found in netlink.entry("get", tuple_orig=wanted):
                    if (now := conntrack.read(family, found)) and now.state is entry.state:
                        # With its id none is taken that has come in its place since the last line but one.
                        netlink.entry("del", tuple_orig=wanted, id=found.get_attr("CTA_ID"))
                        forgotten += 1
    return forgotten


def _wanted(family: int, flow: Flow) -> Any:
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

    source, destination = (socket.inet_ntop(family, address) for address in (flow.source, flow.destination))
    return NFCTAttrTuple(family, source, destination, socket.IPPROTO_TCP, flow.source_port, flow.destination_port)
