"""After an uninstall: what must stay until the last connection through the data plane has ended.

When the last user of NAT in a network namespace goes, the kernel takes its NAT and conntrack hooks away, and packets of
connections that were redirected are no longer translated: they are reset. An empty nat chain keeps the NAT hooks, and a
rule that asks for `ct state` keeps conntrack; neither redirects anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent.engines.base import DIALLED_MARK
from agent.engines.nftables import tproxy
from agent.engines.nftables.nft import Objects
from agent.engines.nftables.parts import Parts
from agent.engines.nftables.table import FAMILY, NAME, TABLE, Chain, Hook, Rule, Set, Table
from agent.policy import Policy

PORTS = "draining_ports"
ANSWERS_TABLE = f"{FAMILY} {NAME}_answers"
_CHAIN = "draining"
_PROC = Path("/proc/net/nf_conntrack")
_MARK = re.compile(r" mark=(\d+)")
_TUPLE = re.compile(r"src=(?P<src>\S+) dst=(?P<dst>\S+) sport=(?P<sport>\d+) dport=(?P<dport>\d+)")
_OVER = ("TIME_WAIT", "CLOSE")
_TCP = 6
_IPS_DST_NAT = 1 << 5
"""include/uapi/linux/netfilter/nf_conntrack_common.h: the destination was translated."""
_TCP_CONNTRACK_TIME_WAIT = 7
"""Later states (enum tcp_conntrack) mean the connection is over: TIME_WAIT 7, CLOSE 8."""


def leftover(current: Objects | None, also: Iterable[int] = ()) -> str:
    """The transaction that leaves no redirect of ours, but keeps conntrack and NAT for connections that run.

    `also` are ports that another engine's rules redirect to.
    """
    ports = tuple(str(port) for port in sorted({*redirected_ports(current or []), *also}))
    rule = Rule("ct state established", "accept", "connections through the data plane may finish")
    table = Table(
        (Set(PORTS, "inet_service", ports),),
        (
            Chain(f"{_CHAIN}_nat", (), Hook("nat", "output", -99)),
            Chain(_CHAIN, (rule,), Hook("filter", "output", -1)),
        ),
    )
    # The kernel makes the new chains before it lets go of the old ones, so NAT always has a user.
    clearing = f"delete table {TABLE}\n" if current is not None else ""
    return clearing + table.render()


def answers_leftover(policy: Policy | None) -> str:
    """The transaction that makes a table of its own which brings applications' answers back as `tproxy` did.

    It also looks after what the data plane accepted under `policy` and has not dialled for yet: that is not redirected
    by the rules that come.
    """
    chains: tuple[Chain, ...]
    if policy is None:
        chains = (Chain(tproxy.ANSWERS, (tproxy.answer(),), Hook("route", "output", tproxy.MANGLE)),)
    else:
        parts = Parts(policy)
        kept = Chain("dialled", tuple(tproxy.undisturbed(parts)), Hook("nat", "output", tproxy.FIRST))
        chains = (*tproxy.output_chains(parts), kept)
    return Table((), chains, ANSWERS_TABLE).render()


def is_leftover(current: Objects) -> bool:
    """Whether a table is what `leftover` left."""
    return any(item.get("set", {}).get("name") == PORTS for item in current)


def redirected_ports(current: Objects) -> tuple[int, ...]:
    """The data plane's ports that a table redirects, or did before it became a leftover."""
    found: set[int] = set()
    for item in current:
        for part in item.get("rule", {}).get("expr", ()):
            redirect = part.get("redirect")
            if redirect and isinstance(redirect.get("port"), int):
                found.add(redirect["port"])
        if item.get("set", {}).get("name") == PORTS:
            found |= {port for element in item["set"].get("elem", ()) for port in _ports(element)}
    return tuple(sorted(found))


def _ports(element: object) -> Iterable[int]:
    if isinstance(element, int):
        return (element,)
    if isinstance(element, dict) and "range" in element:
        first, last = element["range"]
        return range(first, last + 1)
    return ()


def running(ports: Iterable[int]) -> int:
    """How many TCP connections of this network namespace are redirected to one of `ports` and have not ended.

    0 as well when the kernel cannot be asked.
    """
    wanted = frozenset(ports)
    if not wanted:
        return 0
    if _PROC.exists():
        lines = _PROC.read_text(errors="replace").splitlines()
        return sum(1 for line in lines if _runs(line, wanted))
    try:
        return sum(1 for port in _translated_ports() if port in wanted)
    except OSError:
        return 0


def dialled() -> int:
    """How many TCP connections the data plane has dialled from its clients' addresses, and have not ended.

    0 as well when the kernel cannot be asked.
    """
    if _PROC.exists():
        lines = _PROC.read_text(errors="replace").splitlines()
        return sum(1 for line in lines if _is_dialled(line))
    try:
        return sum(1 for entry in _entries() if (entry.get_attr("CTA_MARK") or 0) & DIALLED_MARK and _is_alive(entry))
    except OSError:
        return 0


def _is_dialled(line: str) -> bool:
    fields, mark = line.split(), _MARK.search(line)
    if len(fields) < 6 or fields[2] != "tcp" or fields[5] in _OVER:
        return False
    return mark is not None and bool(int(mark[1]) & DIALLED_MARK)


def _runs(line: str, wanted: frozenset[int]) -> bool:
    """Whether a line of /proc/net/nf_conntrack is a TCP connection that was redirected to a port and has not ended.

    Each line has the addresses and ports of the original and of its reply. A reply that comes from elsewhere than the
    original went to tells that the destination was translated.
    """
    fields = line.split()
    if len(fields) < 6 or fields[2] != "tcp" or fields[5] in _OVER:
        return False
    tuples = [(found["src"], found["dst"], found["sport"], found["dport"]) for found in _TUPLE.finditer(line)]
    if len(tuples) != 2:
        return False
    (_, asked, _, asked_port), (answers, _, answers_port, _) = tuples
    return int(answers_port) in wanted and (asked, asked_port) != (answers, answers_port)


def _translated_ports() -> Iterator[int]:
    """The ports that running connections were redirected to, from the kernel's conntrack table over netlink."""
    for entry in _entries():
        port = _translated_port(entry)
        if port is not None:
            yield port


def _entries() -> Iterator[Any]:
    import socket

    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    for family in (socket.AF_INET, socket.AF_INET6):
        with NFCTSocket(nfgen_family=family) as conntrack:
            yield from conntrack.dump()


def _translated_port(entry: Any) -> int | None:
    """The port a running TCP connection was redirected to; None for every other entry."""
    if not (entry.get_attr("CTA_STATUS") or 0) & _IPS_DST_NAT:
        return None
    proto = entry.get_attr("CTA_TUPLE_REPLY").get_attr("CTA_TUPLE_PROTO")
    return int(proto.get_attr("CTA_PROTO_SRC_PORT")) if _is_alive(entry) else None


def _is_alive(entry: Any) -> bool:
    """Whether an entry is a TCP connection that has not ended."""
    if entry.get_attr("CTA_TUPLE_REPLY").get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM") != _TCP:
        return False
    info = entry.get_attr("CTA_PROTOINFO")
    tcp = info.get_attr("CTA_PROTOINFO_TCP") if info else None
    return bool((tcp.get_attr("CTA_PROTOINFO_TCP_STATE") if tcp else 0) < _TCP_CONNTRACK_TIME_WAIT)
