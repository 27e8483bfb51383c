"""What conntrack remembers of the connections of this network namespace, mostly of TCP.

/proc/net/nf_conntrack is read where the kernel has it (CONFIG_NF_CONNTRACK_PROCFS), because Python does so ten times as
fast as it takes netlink messages apart; else the kernel is asked over netlink.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from tpctl.host import proc
from tpctl.system import netlink, text
from tpctl.system.netlink import Netlink

LISTING = "nf_conntrack"
"""Below /proc/net."""
COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
"""There when conntrack is loaded."""
_HALF_CLOSED = ("nf_conntrack_tcp_timeout_fin_wait", "nf_conntrack_tcp_timeout_close_wait")
"""Below /proc/sys/net/netfilter."""
_CLOSE_WAIT_SECONDS = 60
"""What the kernel begins with (net/netfilter/nf_conntrack_proto_tcp.c)."""
_TUPLE = re.compile(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)")
_MARK = re.compile(r" mark=(\d+)")
_ZONE = re.compile(r" zone(?:-orig|-reply)?=[1-9]")
NEW, GET, DELETE = 0x100, 0x101, 0x102
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_NEW and so on; the attributes that follow are of the same file."""
TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, TIMEOUT, ID = 1, 2, 3, 4, 7, 12
PROTOINFO_TCP, PROTOINFO_TCP_STATE = 1, 1
_MARK_OF, _ZONE_OF_ALL = 8, 18
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
_ADDRESSES = {4: (1, 2), 16: (3, 4)}
_PROTO_NUM, _PORTS = 1, (2, 3)
_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_SEEN_REPLY = 1 << 1
"""IPS_SEEN_REPLY (include/uapi/linux/netfilter/nf_conntrack_common.h)."""


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
        lines = text.lines(proc.read_net(LISTING))
        yield from (entry for line in lines if over not in line and (entry := parse(line)))
        return
    try:
        for family in _FAMILIES.values():
            yield from _asked(family)
    except OSError:
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
    with Netlink(netlink.NETFILTER) as kernel:
        for message in kernel.ask(GET, head(family), netlink.DUMP):
            if (entry := read(message)) and entry.state is not State.TIME_WAIT:
                yield entry


def head(family: int) -> bytes:
    """What a request begins with (struct nfgenmsg, linux/netfilter/nfnetlink.h)."""
    return struct.pack("=BBH", family, 0, 0)


def told(flow: Flow, protocol: int = socket.IPPROTO_TCP) -> netlink.Value:
    """A connection's flow as an attribute (enum ctattr_tuple, linux/netfilter/nfnetlink_conntrack.h)."""
    source, destination = _ADDRESSES[len(flow.source)]
    ports = {_PORTS[0]: struct.pack("!H", flow.source_port), _PORTS[1]: struct.pack("!H", flow.destination_port)}
    return {
        _TUPLE_IP: {source: flow.source, destination: flow.destination},
        _TUPLE_PROTO: {_PROTO_NUM: bytes([protocol]), **ports},
    }


def reply_of(flow: Flow, protocol: int, zone: int) -> Flow | None:
    """The other direction of a flow as conntrack expects it: from whoever really answers. None where it is not known.

    Raises OSError when the kernel refuses.
    """
    if not COUNT.exists():
        return None
    with Netlink(netlink.NETFILTER) as kernel, contextlib.suppress(FileNotFoundError):
        for message in kernel.ask(GET, _request(flow, protocol, zone)):
            return _flow_of(netlink.parse(attributes_of(message).get(TUPLE_REPLY, b"")))
    return None


def _request(flow: Flow, protocol: int, zone: int) -> bytes:
    in_zone = {_ZONE_OF_ALL: struct.pack("!H", zone)} if zone else {}
    family = socket.AF_INET if len(flow.source) == 4 else socket.AF_INET6
    return head(family) + netlink.attributes({TUPLE_ORIG: told(flow, protocol), **in_zone})


def forget(flow: Flow, protocol: int, zone: int) -> None:
    """Let conntrack forget a flow, if it knows it. A kernel without conntrack is not made to load it.

    Raises OSError when the kernel refuses.
    """
    if not COUNT.exists():
        return
    with Netlink(netlink.NETFILTER) as kernel, contextlib.suppress(FileNotFoundError):
        kernel.change(DELETE, _request(flow, protocol, zone))


def forget_answered(port: int, *, deadline: float) -> None:
    """Let conntrack forget what was answered over UDP from a port of a loopback address, in every zone.

    Until `deadline`, a time of time.monotonic(). Raises OSError when the kernel refuses.
    """
    if not COUNT.exists():
        return
    for family in _FAMILIES.values():
        with Netlink(netlink.NETFILTER) as kernel:
            answered = [message for message in kernel.ask(GET, head(family), netlink.DUMP) if _is_answer(message, port)]
            for message in answered:
                if time.monotonic() > deadline:
                    return
                found = attributes_of(message)
                named = {which: found[which] for which in (TUPLE_ORIG, _ZONE_OF_ALL, ID) if which in found}
                with contextlib.suppress(FileNotFoundError):  # it has gone by itself
                    kernel.change(DELETE, head(family) + netlink.attributes(named))


def _is_answer(message: bytes, port: int) -> bool:
    found = attributes_of(message)
    reply = netlink.parse(found.get(TUPLE_REPLY, b""))
    protocol = netlink.parse(reply.get(_TUPLE_PROTO, b"")).get(_PROTO_NUM)
    if protocol != bytes([socket.IPPROTO_UDP]) or not int.from_bytes(found.get(STATUS, b""), "big") & _SEEN_REPLY:
        return False
    flow = _flow_of(reply)
    return flow.source_port == port and ip_address(flow.source).is_loopback


def read(message: bytes) -> Entry | None:
    """An entry of the kernel's message about a connection; None for what is no TCP."""
    found = attributes_of(message)
    tcp = netlink.parse(netlink.parse(found.get(PROTOINFO, b"")).get(PROTOINFO_TCP, b""))
    if PROTOINFO_TCP_STATE not in tcp:
        return None
    tuples = [netlink.parse(found.get(which, b"")) for which in (TUPLE_ORIG, TUPLE_REPLY)]
    has_zone = any(map(any, (found.get(_ZONE_OF_ALL, b""), tuples[0].get(_TUPLE_ZONE, b""))))
    mark = int.from_bytes(found.get(_MARK_OF, b""), "big")
    return Entry(State(tcp[PROTOINFO_TCP_STATE][0]), _flow_of(tuples[0]), _flow_of(tuples[1]), mark, has_zone)


def attributes_of(message: bytes) -> netlink.Attributes:
    """The attributes of the kernel's message about a connection."""
    return netlink.parse(message[len(head(0)) :])


def _flow_of(parts: netlink.Attributes) -> Flow:
    addresses, ports = (netlink.parse(parts.get(which, b"")) for which in (_TUPLE_IP, _TUPLE_PROTO))
    source, destination = next(pair for pair in _ADDRESSES.values() if pair[0] in addresses)
    numbers = (int.from_bytes(ports[which], "big") for which in _PORTS)
    return Flow(addresses[source], next(numbers), addresses[destination], next(numbers))
