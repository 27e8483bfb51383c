"""What conntrack remembers of the TCP connections of this network namespace.

/proc/net/nf_conntrack is read where the kernel has it (CONFIG_NF_CONNTRACK_PROCFS), because Python does so ten times as
fast as it takes netlink messages apart; else the kernel is asked over netlink.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from agent.host import proc

LISTING = "nf_conntrack"
"""Below /proc/net."""
_HALF_CLOSED = ("nf_conntrack_tcp_timeout_fin_wait", "nf_conntrack_tcp_timeout_close_wait")
"""Below /proc/sys/net/netfilter."""
_CLOSE_WAIT_SECONDS = 60
"""What the kernel begins with (net/netfilter/nf_conntrack_proto_tcp.c)."""
_TUPLE = re.compile(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)")
_MARK = re.compile(r" mark=(\d+)")
_ZONE = re.compile(r" zone(?:-orig|-reply)?=[1-9]")
_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


class State(IntEnum):
    """enum tcp_conntrack (include/uapi/linux/netfilter/nf_conntrack_tcp.h)."""

    NONE = 0
    SYN_SENT = 1
    SYN_RECV = 2
    ESTABLISHED = 3
    FIN_WAIT = 4
    CLOSE_WAIT = 5
    LAST_ACK = 6
    TIME_WAIT = 7
    CLOSE = 8
    SYN_SENT2 = 9


_STATES = {state.name: state for state in State}
_OVER = (State.TIME_WAIT, State.CLOSE)


def half_closed_seconds() -> int:
    """After how long conntrack forgets a connection of which one side has ended, and the other is silent."""
    try:
        return min(int(Path("/proc/sys/net/netfilter", name).read_text()) for name in _HALF_CLOSED)
    except (OSError, ValueError):  # the module is not loaded, and may be later
        return _CLOSE_WAIT_SECONDS


class Flow(NamedTuple):
    """One direction of a connection. Addresses are packed, as socket.inet_pton makes them."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int

    def reversed(self) -> Flow:
        """The other direction, if nothing is translated."""
        return Flow(self.destination, self.destination_port, self.source, self.source_port)


class Entry(NamedTuple):
    """A TCP connection."""

    state: State
    original: Flow
    reply: Flow
    mark: int
    has_zone: bool
    """Whether it is in another conntrack zone than the default one."""

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.state not in _OVER

    @property
    def is_translated(self) -> bool:
        """Whether NAT changed an address or port of either end."""
        return self.reply != self.original.reversed()

    @property
    def is_redirected(self) -> bool:
        """Whether somebody else answers than who was called."""
        return self.reply[:2] != self.original[2:]


def entries() -> Iterator[Entry]:
    """Those there are, but in TIME_WAIT; none when the kernel cannot be asked.

    A busy host has tens of thousands in TIME_WAIT. They are over, and begin anew with the next SYN.
    """
    if (proc.NET / LISTING).exists():
        over = f" {State.TIME_WAIT.name} "
        lines = proc.read_net(LISTING).splitlines()
        yield from (entry for line in lines if over not in line and (entry := parse(line)))
        return
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        for family in _FAMILIES.values():
            yield from _asked(family)
    except (OSError, NetlinkError):
        return


def parse(line: str) -> Entry | None:
    """An entry of a line of /proc/net/nf_conntrack (net/netfilter/nf_conntrack_standalone.c); None for what is no TCP.

    >>> parse("ipv4     2 udp      17 29 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=53")
    """
    fields = line.split(maxsplit=6)
    if len(fields) < 7 or fields[2] != "tcp" or fields[5] not in _STATES or fields[0] not in _FAMILIES:
        return None
    flows = [_flow(_FAMILIES[fields[0]], *found.groups()) for found in _TUPLE.finditer(fields[6])]
    if len(flows) != 2:
        return None
    mark = _MARK.search(fields[6])
    return Entry(_STATES[fields[5]], flows[0], flows[1], int(mark[1]) if mark else 0, bool(_ZONE.search(fields[6])))


def _flow(family: int, source: str, destination: str, source_port: str | int, destination_port: str | int) -> Flow:
    packed = (socket.inet_pton(family, address) for address in (source, destination))
    return Flow(next(packed), int(source_port), next(packed), int(destination_port))


def _asked(family: int) -> Iterator[Entry]:
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    with NFCTSocket(nfgen_family=family) as conntrack:
        for message in conntrack.dump():
            if (entry := read(family, message)) and entry.state is not State.TIME_WAIT:
                yield entry


def read(family: int, message: Any) -> Entry | None:
    """An entry of a netlink message of pyroute2's about a connection of that family; None for what is no TCP."""
    protocol = message.get_attr("CTA_PROTOINFO")
    tcp = protocol.get_attr("CTA_PROTOINFO_TCP") if protocol else None
    if tcp is None:
        return None
    flows = [_told(family, message.get_attr(f"CTA_TUPLE_{which}")) for which in ("ORIG", "REPLY")]
    state = State(tcp.get_attr("CTA_PROTOINFO_TCP_STATE"))
    has_zone = any(part.get_attr(name) for part, name in (
        (message, "CTA_ZONE"), (message.get_attr("CTA_TUPLE_ORIG"), "CTA_TUPLE_ZONE"),
    ))  # fmt: skip
    return Entry(state, flows[0], flows[1], message.get_attr("CTA_MARK") or 0, has_zone)


def _told(family: int, told: Any) -> Flow:
    version = 4 if family == socket.AF_INET else 6
    addresses, ports = told.get_attr("CTA_TUPLE_IP"), told.get_attr("CTA_TUPLE_PROTO")
    return _flow(
        family,
        addresses.get_attr(f"CTA_IP_V{version}_SRC"),
        addresses.get_attr(f"CTA_IP_V{version}_DST"),
        ports.get_attr("CTA_PROTO_SRC_PORT"),
        ports.get_attr("CTA_PROTO_DST_PORT"),
    )
