"""Packets that the kernel drops outside netfilter: what its drop reasons and its counters mean. Pure, but for `read`.

Counters are those of this network namespace (/proc/net/netstat and others); they do not tell whose packet it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tpctl.arrival.drop_reasons import Drop
from tpctl.arrival.model import Finding, Probe
from tpctl.host.proc import read_net
from tpctl.spec.policy import Family
from tpctl.system import text

_Meaning = tuple[str, str | None]
"""What it means, and a command."""
_REVERSE_PATH: _Meaning = (
    "reverse path filter: packets from that address are expected on another interface (rp_filter, "
    "Documentation/networking/ip-sysctl.rst)",
    "sysctl -w net.ipv4.conf.all.rp_filter=2",  # the higher of this and the interface's own counts
)
_NO_WAY_OUT: _Meaning = ("there is no route to the destination", None)
_NO_WAY_IN: _Meaning = ("there is no route for what arrived", None)
_NOT_MINE: _Meaning = ("the destination is not an address of this host, and it does not forward", None)
_MARTIAN: _Meaning = (
    "its source or destination is an address that cannot arrive there (a martian): a loopback address on another "
    "interface, or this host's own",
    None,
)
_NO_NEIGHBOUR: _Meaning = ("the next hop does not answer ARP or neighbour discovery", None)
_CONTROL_GROUP = "a program of a control group does not let it {way} (systemd has some, for IPAddressDeny=)"
_TRAFFIC_CONTROL: _Meaning = ("a filter of traffic control drops it (tc(8); Cilium and others have some)", None)
_QUEUE: _Meaning = ("a queueing discipline drops it (tc(8))", None)

_REASONS: Mapping[str, _Meaning] = {
    "IP_RPFILTER": _REVERSE_PATH,
    "IP_LOCAL_SOURCE": (
        "it arrives with an address of this host as its source (a martian)",
        "sysctl -w net.ipv4.conf.all.accept_local=1",
    ),
    "IP_INVALID_SOURCE": _MARTIAN,
    "IP_INVALID_DEST": _MARTIAN,
    "IP_LOCALNET": _MARTIAN,
    "IP_OUTNOROUTES": _NO_WAY_OUT,
    "IP_INNOROUTES": _NO_WAY_IN,
    "IP_INADDRERRORS": _NOT_MINE,
    "XFRM_POLICY": ("an IPsec policy does not allow it (ip-xfrm(8))", None),
    "BPF_CGROUP_EGRESS": (_CONTROL_GROUP.format(way="out"), None),
    "SOCKET_FILTER": (f"a filter of its socket drops it, or {_CONTROL_GROUP.format(way='in')}", None),
    "TC_INGRESS": _TRAFFIC_CONTROL,
    "TC_EGRESS": _TRAFFIC_CONTROL,
    "XDP": ("a program of XDP drops it (ip-link(8))", None),
    "SECURITY_HOOK": ("a security module does not allow it", None),
    "QDISC_DROP": _QUEUE,
    "QDISC_OVERLIMIT": _QUEUE,
    "NEIGH_FAILED": _NO_NEIGHBOUR,
    "NEIGH_CREATEFAIL": _NO_NEIGHBOUR,
    "NEIGH_DEAD": _NO_NEIGHBOUR,
    "IPV6DISABLED": ("the interface has no IPv6 (disable_ipv6)", None),
    "TCP_LISTEN_OVERFLOW": ("the data plane does not accept: its queue of connections is full", None),
    "SOCKET_RCVBUFF": ("the data plane does not read: its receive buffer is full", None),
    "NETFILTER_DROP": ("a rule or program of netfilter that no listing of its tables shows, such as a bridge's", None),
}
"""The names of drop reasons are those of include/net/dropreason-core.h, which stay; the last is the least certain."""
_FUNCTIONS = {"ip_rcv_finish_core": _MARTIAN}
"""Where a kernel before Linux 6.14 gives no reason (NOT_SPECIFIED): rp_filter and missing routes have theirs."""

_COUNTERS: Mapping[str, _Meaning] = {
    "TcpExt IPReversePathFilter": _REVERSE_PATH,
    "Ip OutNoRoutes": _NO_WAY_OUT,
    "Ip6 Ip6OutNoRoutes": _NO_WAY_OUT,
    "Ip6 Ip6InNoRoutes": _NO_WAY_IN,
    "Ip InAddrErrors": _NOT_MINE,
    "Ip6 Ip6InAddrErrors": _NOT_MINE,
    "TcpExt ListenOverflows": _REASONS["TCP_LISTEN_OVERFLOW"],
    "Udp RcvbufErrors": _REASONS["SOCKET_RCVBUFF"],
}
_OF_ONE_FAMILY = {"TcpExt IPReversePathFilter": Family.IPV4, "Ip": Family.IPV4, "Ip6": Family.IPV6, "Udp": Family.IPV4}


def read() -> Mapping[str, int]:
    """The counters that mean anything here, by group and name; none where /proc is out of reach."""
    found: dict[str, int] = {}
    for name in ("netstat", "snmp"):
        found.update(parse(read_net(name)))
    for line in text.lines(read_net("snmp6")):
        words = text.words(line)
        if len(words) == 2 and words[1].isdecimal():
            found[f"Ip6 {words[0]}"] = int(words[1])
    return {name: value for name, value in found.items() if name in _COUNTERS}


def parse(listing: str) -> dict[str, int]:
    """Pairs of lines: `TcpExt: NAME NAME ...` and `TcpExt: 1 2 ...`."""
    found: dict[str, int] = {}
    lines = list(text.lines(listing))
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        group, *named = text.words(names)
        for name, value in zip(named, text.words(values)[1:], strict=False):
            if value.lstrip("-").isdecimal():
                found[f"{group.rstrip(':')} {name}"] = int(value)
    return found


def by_reason(drops: Iterable[Drop], probe: Probe) -> Finding | None:
    """The reason why the kernel itself has dropped packets of a probe's family, if it is one that tells anything."""
    mine = [drop for drop in drops if drop.family is probe.family]
    for reason, meaning in _REASONS.items():
        for drop in mine:
            if drop.reason == reason:
                return _finding(f"drop reason {reason} in {drop.function}", meaning)
    return next((_finding(f"in {drop.function}", _FUNCTIONS[drop.function]) for drop in mine if _is_told(drop)), None)


def _is_told(drop: Drop) -> bool:
    return drop.reason == "NOT_SPECIFIED" and drop.function in _FUNCTIONS


def by_counters(before: Mapping[str, int], after: Mapping[str, int], probe: Probe) -> Finding | None:
    """What the kernel has counted meanwhile, as the likely reason."""
    for name, meaning in _COUNTERS.items():
        family = _OF_ONE_FAMILY.get(name, _OF_ONE_FAMILY.get(name.split()[0]))
        if after.get(name, 0) > before.get(name, 0) and family in (None, probe.family):
            return _finding(f"{name.split()[-1]} has risen", meaning)
    return None


def _finding(what: str, meaning: _Meaning) -> Finding:
    said, command = meaning
    return Finding(f"the kernel itself ({what}): {said}", None, command)
