"""Whether the data plane's sockets take what lands at its ports. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import NamedTuple

from tpctl.engines.landings import Landing, Port, when_nobody_listens
from tpctl.host.holders import Process
from tpctl.host.sockets import Listener
from tpctl.spec.policy import Family, Policy, Protocol
from tpctl.system.text import on_one_line

_MANAGER = (1, "systemd")
"""Holds the sockets of a service that it starts when somebody connects (systemd.socket(5))."""


class PortStatus(NamedTuple):
    """Who listens on a port of the data plane."""

    role: str
    protocol: Protocol
    port: int
    uids: tuple[int, ...]
    """The users whose processes hold the listening sockets; empty when nothing listens."""
    problem: str | None
    addresses: tuple[str, ...] = ()
    """What the sockets are bound to, in words."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The listening sockets of a host, and what holds them."""

    listeners: tuple[Listener, ...] = ()
    processes: Mapping[int, tuple[Process, ...]] = field(default_factory=dict)
    """By inode; none where they cannot be seen."""
    registered: frozenset[int] | None = None
    """The sockets to which eBPF programs give what arrives, by cookie; None without such programs."""

    def at(self, port: Port) -> tuple[Listener, ...]:
        """The sockets that listen on a port, whatever they are bound to."""
        return tuple(one for one in self.listeners if (one.protocol, one.port) == (port.protocol, port.number))

    def uids(self, listener: Listener, proxy_uid: int) -> frozenset[int]:
        """As whom a socket is used: as the data plane's user if one of its processes holds it.

        Without processes to be seen it is who made it, and also if only root holds it, who can act as anybody. One that
        only systemd holds waits for the service.
        """
        held = self.processes.get(listener.inode, ())
        uids = frozenset(process.uid for process in held)
        if not uids - {0} and listener.uid == proxy_uid:
            uids = frozenset({proxy_uid})
        uids = uids or frozenset({listener.uid})
        is_waiting = bool(held) and all((process.number, process.name) == _MANAGER for process in held)
        return frozenset({proxy_uid}) if proxy_uid in uids or is_waiting else uids


def port_status(port: Port, landings: Iterable[Landing], policy: Policy, seen: Seen) -> PortStatus:
    """Judge the sockets of one port by what lands there."""
    mine = seen.at(port)
    uids = frozenset[int]().union(*(seen.uids(one, policy.proxy_uid) for one in mine))
    found = "; ".join(_problems(port, tuple(one for one in landings if one.port == port), policy, seen))
    shown = tuple(dict.fromkeys(map(bound_to, mine)))
    return PortStatus(port.role, port.protocol, port.number, tuple(sorted(uids)), found or None, shown)


def _problems(port: Port, landings: tuple[Landing, ...], policy: Policy, seen: Seen) -> Iterator[str]:
    mine = seen.at(port)
    if not mine:
        yield f"nothing listens on {port}: {when_nobody_listens(policy)}"
        return
    chosen = {landing: _chosen(landing, mine, seen.registered) for landing in landings}
    used = {one for takers in chosen.values() for one in takers} if landings else set(mine)
    strangers = sorted(frozenset[int]().union(*(seen.uids(one, policy.proxy_uid) for one in used)) - {policy.proxy_uid})
    if strangers:
        yield (
            f"the listener on {port} runs as uid {', '.join(map(str, strangers))}, not as the data plane user "
            f"{policy.proxy_uid}: its own connections are redirected back to it"
        )
    known_by_maker = (one for landing, takers in chosen.items() if landing.by_maker for one in takers)
    makers = {one.uid for one in known_by_maker} - {policy.proxy_uid}
    if makers and not strangers:
        yield (
            f"the socket on {port} was made by uid {', '.join(map(str, sorted(makers)))}, as systemd makes one for a "
            f"service, and not by the data plane user {policy.proxy_uid}, by which the rules know its answers (z2): "
            "the answers are lost; let the data plane open it itself, or use --skip-dns-conntrack-zone-split"
        )
    if lost := [landing for landing, takers in chosen.items() if not takers]:
        whose = ", ".join(_groups(landings, lost))
        sockets = ", ".join(dict.fromkeys(map(bound_to, mine)))
        yield (
            f"what listens on {port} is bound to {sockets}, and does not take {whose}: {when_nobody_listens(policy)}; "
            f"{_advice(lost, mine, policy)}"
        )
    holding = [process for one in used for process in seen.processes.get(one.inode, ())]
    if holding and all(process.is_stopped for process in holding):
        names = ", ".join(dict.fromkeys(f"{on_one_line(one.name)} (process {one.number})" for one in holding))
        yield f"what listens on {port} is stopped (SIGSTOP), and serves nobody: {names}"
    if any(one.is_full for one in used):
        yield (
            f"the queue of {port} is full: the data plane does not accept the connections that wait there, and new "
            "ones are dropped"
        )


def _groups(landings: Sequence[Landing], lost: Sequence[Landing]) -> Iterator[str]:
    """Whose connections are lost; with the addresses, if it is not all of them."""
    partly = {landing.whose for landing in landings if landing not in lost}
    for whose in dict.fromkeys(landing.whose for landing in lost):
        addresses = ", ".join(str(landing.address) for landing in lost if landing.whose == whose)
        yield f"{whose} to {addresses}" if whose in partly else whose


def _chosen(landing: Landing, sockets: Iterable[Listener], registered: frozenset[int] | None) -> tuple[Listener, ...]:
    """The sockets among which the kernel chooses: those bound to just this address or interface come first.

    compute_score() in net/ipv4/inet_hashtables.c and udp.c.
    """
    takers = [one for one in sockets if _takes(one, landing)]
    if landing.chosen_by_programs and registered is not None:
        takers = [one for one in takers if one.cookie is None or one.cookie in registered]
    best = max(map(_score, takers), default=0)
    return tuple(one for one in takers if _score(one) == best)


def _score(listener: Listener) -> int:
    return (not listener.address.is_unspecified) + (listener.device is not None)


def _takes(listener: Listener, landing: Landing) -> bool:
    if listener.device is not None and listener.device != landing.interface:
        return False
    if landing.transparent and listener.transparent is False:
        return False
    return listener.takes(landing.address)


def _advice(lost: Iterable[Landing], sockets: Iterable[Listener], policy: Policy) -> str:
    if any(landing.transparent for landing in lost) and all(one.transparent is False for one in sockets):
        return "its socket needs IP_TRANSPARENT, which `tpctl relay --transparent` sets"
    if all(landing.port.protocol is Protocol.UDP and not landing.address.is_unspecified for landing in lost):
        # A wildcard socket would answer from another address, unless it uses IP_PKTINFO (ip(7)).
        return f"let it listen on {', '.join(dict.fromkeys(str(landing.address) for landing in lost))} as well"
    if any(landing.chosen_by_programs and _takes(one, landing) for landing in lost for one in sockets):
        return (
            "the eBPF programs do not know its socket: it began to listen in a control group to which they are not "
            "attached (--ebpf-cgroup-path); start it in one below that"
        )
    if Family.IPV6 not in policy.families:
        return "let it listen on 0.0.0.0"
    return "let it listen on [::], for both families (without IPV6_V6ONLY), or on [::] and 0.0.0.0"


def bound_to(listener: Listener) -> str:
    """What a socket is bound to, with what that keeps out."""
    address = listener.address
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    text = f"[{address}]" if isinstance(address, IPv6Address) and not mapped else str(mapped or address)
    limits = []
    if address.is_unspecified:
        if address.version == 4:
            limits.append("IPv4 only")
        elif listener.v6only:
            limits.append("IPv6 only")
    elif (mapped or address).is_loopback:
        limits.append("loopback only")
    else:
        limits.append("no other address")
    if listener.device:
        limits.append(f"interface {listener.device} only")
    return f"{text} ({', '.join(limits)})" if limits else text
