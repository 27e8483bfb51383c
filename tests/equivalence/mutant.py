"""What a mutation is, and the ones that cannot be seen, with the reason written down.

A mutant is one small mistake in an engine's plan. Some mistakes change nothing: the rules hold something twice for
safety, or the rig has nobody who could send the packet that would show it. Those are counted apart and never as caught.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from tpctl.rehearsal.layout import member
from tpctl.spec.policy import Address, DnsCapture, Family, Policy, contains


@dataclass(frozen=True, slots=True)
class Spot:
    """The place of a mistake, in words that both engines share."""

    rule: str
    """The rule's name in `tpctl.spec.decide` (o3, z4), or the comment of one that has none."""
    part: str
    """Which part of it: "rule", "SYN", "local", "owner", "port", "source", "destination", "in", "out", ..."""
    family: Family | None = None
    chain: str = ""
    text: str = ""
    """The rule as it was."""
    other: str = ""
    """The name of the rule it was swapped with."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken plan."""

    kind: str
    spot: Spot
    plan: Any
    became: str
    unseen: str | None = None
    """Why nobody can tell it from the right one; None when somebody must."""

    def __str__(self) -> str:
        return f"{self.kind} [{self.spot.rule}/{self.spot.part}] {self.spot.chain}: {self.spot.text}  =>  {self.became}"


def name_of(comment: str) -> str:
    """A rule's name, from its comment."""
    return comment.removeprefix("tpctl/").partition(":")[0]


_INBOUND_RULES = {"i0", "i3 to i7", "i3", "i4", "i5", "i6", "i7", "to the inbound listener"}
_One = TypeVar("_One")
Judge = Callable[[Policy, str, Spot], str | None]


def unseen(policy: Policy, kind: str, spot: Spot) -> str | None:
    """Why a mutation of a kind at a spot changes nothing that can be seen; None when it must be caught."""
    return next((reason for judge in _JUDGES if (reason := judge(policy, kind, spot))), None)


def _logging(_: Policy, kind: str, spot: Spot) -> str | None:
    return "it only logs" if spot.rule.startswith("log") or "LOG" in spot.chain else None


def _switched_off(policy: Policy, kind: str, spot: Spot) -> str | None:
    if not policy.inbound.enabled:
        if {spot.rule, spot.other} & _INBOUND_RULES:
            return "inbound redirection is off: nothing is redirected there anyway"
        if spot.rule == "o3":
            return "inbound redirection is off: o3 leads nowhere"
        if spot.rule == "x4" and spot.part == "owner" and kind == "drop a condition":
            return "inbound redirection is off: o3 leads nowhere, and o5 lets the data plane's queries pass too"
        if (spot.rule == "o2" and spot.part != "out") or spot.other == "o2":
            return "inbound redirection is off: there is no o3 that o2 would keep off, and o4 and o5 let it pass too"
    if not policy.outbound.enabled and not policy.dns.tcp and spot.chain.lower().endswith(("outbound", "dns_tcp")):
        return "outbound redirection is off: whatever gets here passes"
    if spot.rule == "o0":
        return "the chain ends there anyway"
    jump = "new connections of this host"
    return jump + ": outbound redirection is off" if spot.rule == jump and not policy.outbound.enabled else None


def _held_twice(policy: Policy, kind: str, spot: Spot) -> str | None:
    if spot.rule == "o6" and spot.part in ("rule", "destination") and kind in ("drop a rule", "off by one"):
        return "o6 is for packets without an owner: o4 and o5 have let every connection over lo pass"
    if {spot.rule, spot.other} == {"o6", "o7"}:
        return "o6 is for packets without an owner: o4 and o5 have let every connection over lo pass"
    if spot.rule == "o4" and kind == "drop a condition" and spot.part == "owner":
        return "the data plane's connections that are still there pass by o5"
    if spot.rule == "o2" and spot.part == "out" and spot.family is Family.IPV4:
        return "the kernel lets no packet from 127.0.0.6 out of another interface than lo"
    everything = policy.dns.capture is DnsCapture.ALL and policy.dns.tcp
    if spot.rule == "x4" and everything and spot.part == "rule" and spot.other != "o1":
        return "d4 has taken every query over TCP but the data plane's"
    passes = ({"x4", "o1"}, {"x4", "o2"}, {"DNS over TCP", "o1"}, {"DNS over TCP", "o2"})
    if {spot.rule, spot.other} in passes and not policy.dns.tcp:
        return "both let the connection pass"
    if spot.rule == "d4" and spot.part in ("family", "destination") and everything and kind == "drop a condition":
        return "s1 has let link-local destinations pass, and of the others d4 takes both families"
    listed, dropped = policy.dns.capture is DnsCapture.LISTED, kind == "drop a condition"
    if spot.rule == "DNS queries" and spot.part == "family" and listed and dropped:
        return "the chain only names servers of the family"
    query = "dns" in spot.chain.lower() or "query" in spot.chain.lower()
    if spot.rule == "s1" and listed and ((query and kind != "negate") or spot.other == "DNS over TCP"):
        return "no listed server is link-local"
    return None


def _out_of_reach(policy: Policy, kind: str, spot: Spot) -> str | None:
    if spot.rule == "z2" and spot.part == "owner" and kind == "drop a condition":
        return "out of reach: nobody else can send from the port that the data plane's listener has"
    if spot.rule == "i2" and spot.part == "destination" and kind == "off by one" and "narrower" in spot.other:
        return "out of reach: the container answers for the addresses of its network itself"
    if (spot.rule == "s1" or "fe80::/10" in spot.text) and kind == "off by one" and "narrower" in spot.other:
        return "out of reach: links only have addresses of fe80::/64"
    if "fe80::/10" in spot.text and kind == "off by one" and spot.part == "source":
        return "out of reach: nobody has an address of fec0::/10"
    if spot.rule == "z7" and "fe80::/10" in spot.text and spot.part == "destination" and kind != "negate":
        return "out of reach: nobody forwards to link-local addresses, or queries that are not of virtual networks"
    if {spot.rule, spot.other} == {"a query to a captured server", "z2"}:
        return "out of reach: nobody else can send from the port that the data plane's listener has"
    return None


def _listener_itself(policy: Policy, kind: str, spot: Spot) -> str | None:
    if "z8" not in (spot.rule, spot.other) or (kind == "drop a condition" and spot.part == "port"):
        return None
    return "only a query from the port of one that was answered shows it; tests/netns/test_dns_listener.py has some"


def _no_server_between(policy: Policy, kind: str, spot: Spot) -> str | None:
    """Excluded destinations where only queries to listed servers come."""
    network = re.search(r"-d (\S+)", spot.text)
    if kind != "off by one" or spot.rule not in ("x2", "z5") or network is None or spot.chain == "TPCTL_OUTBOUND":
        return None
    right = ip_network(network[1])
    wrong = right.supernet()
    if spot.other == "narrower":
        wrong = ip_network((right.network_address, right.prefixlen + 1))
    servers = [server.address for server in policy.dns.servers]
    told = [server for server in servers if (server in right) != (server in wrong)]
    if policy.dns.capture is DnsCapture.LISTED and not told:
        return "only queries to listed servers come here, and none of those lies in between"
    return None


def _no_server(policy: Policy, kind: str, spot: Spot) -> str | None:
    """z7 and z4 of servers from which nothing can arrive, or to which nobody forwards."""
    if spot.rule.startswith("set name_servers") and contains(policy.outbound.exclude_destinations, _address(spot.text)):
        return "an excluded destination is left alone, listed or not"
    if policy.dns.capture is not DnsCapture.LISTED or spot.rule not in ("z4", "z7"):
        return None
    loopback = "127.0.0." in spot.text or "::1/128" in spot.text
    if loopback:
        return "nothing arrives from, or is forwarded to, a loopback address"
    if spot.rule == "z7" and spot.part == "destination" and kind in ("drop a condition", "negate"):
        return None if _has_unlisted_member(policy, spot) else "out of reach: nobody forwards queries to other servers"
    if spot.rule == "z7" and spot.part == "local" and kind == "drop a condition":
        return "no listed server has an address of this host but loopback's, and l1 leaves those to the kernel"
    if spot.rule == "z7" and not _names_a_member(policy, spot):
        return "out of reach: nobody forwards queries to this server but virtual networks, and z6 is asked first"
    return None


def _names_a_member(policy: Policy, spot: Spot) -> bool:
    """Whether a rule, or the set that it asks, has a listed server that is a container."""
    members = [member(vnet.network) for vnet in policy.virtual_networks]
    listed = [server.address for server in policy.dns.servers if server.address in members]
    in_set = [address for address in listed if Family.of(address) is spot.family]
    return bool(in_set) if "@" in spot.text else any(str(address) in spot.text for address in listed)


def _has_unlisted_member(policy: Policy, spot: Spot) -> bool:
    """Whether there is a container to which queries are forwarded, and that is no listed server."""
    listed = [server.address for server in policy.dns.servers]
    members = [member(vnet.network) for vnet in policy.virtual_networks]
    in_set = "@" in spot.text  # of which a container may be a part
    return any(Family.of(address) is spot.family and (in_set or address not in listed) for address in members)


def _transparent(policy: Policy, kind: str, spot: Spot) -> str | None:
    """What `--inbound-mode tproxy` adds for the sake of others, or holds twice."""
    if not policy.inbound.is_transparent:
        return None
    takes_more = spot.part == "source" and kind in ("drop a condition", "negate")
    if spot.rule == "i4" and spot.chain in ("inbound", "TPCTL_INBOUND") and not takes_more:
        return "out of reach: only self-calls come there, and their source is not excluded"
    if spot.rule == "t1" and spot.part in ("owner", "out", "family") and kind == "drop a condition":
        return "out of reach: nobody but the data plane sends from a client's address, and only over loopback"
    answers = spot.chain.lower().endswith("answers")
    if answers and spot.rule == "t1" and (spot.part == "local source" or spot.other) and kind != "negate":
        return "the answers to this host's own addresses stay here anyhow, and no packet meets both rules"
    if spot.rule.startswith("there is no inbound listener") and kind != "negate":
        return "the data plane of a rehearsal always listens; tests/netns/engines/test_tproxy.py has one that does not"
    if spot.rule == "i2" and "TPROXY" in spot.chain.upper() and kind == "off by one":
        return "out of reach: no address of this host lies in between"
    if spot.rule.startswith("answers to a client") and spot.part in ("direction", "family"):
        return "what is sent to this host stays here by either routing table, and the other family is not rehearsed"
    redirected = spot.rule.startswith("the connection was redirected")
    takes_others = redirected or (spot.rule.startswith("what was handed over") and spot.part == "connection mark")
    if kind == "drop a condition" and takes_others and spot.part != "family":
        return None
    if redirected and kind == "drop a rule" and spot.chain == "tproxy_inbound":
        return "what was redirected has no port that is included" if policy.inbound.include_ports else None
    translated = ("what was handed over", "the connection was redirected", "connections that were handed over")
    if any(name.startswith(translated) for name in (spot.rule, spot.other)) and kind != "negate":
        return "it is for SYN cookies and the NAT of others"
    if spot.rule == "to the inbound listener" and ("CONNMARK" in spot.text or "ct mark set" in spot.text):
        return "the mark is for SYN cookies and the NAT of others"
    return None


def _loopback_from_outside(policy: Policy, kind: str, spot: Spot) -> str | None:
    if "l1" not in (spot.rule, spot.other) and not spot.rule.startswith("set this_host"):
        return None
    if spot.part in ("in", "interface") and kind != "negate":
        return "nothing arrives there over loopback for these addresses"
    addresses_only = policy.dns.capture is DnsCapture.LISTED and not policy.virtual_networks
    spares_less = kind in ("drop a rule", "off by one", "swap two rules")
    if "zone" in spot.chain.lower() and addresses_only and spares_less and not _lists_loopback(policy):
        return "the rules after it are for servers elsewhere"
    if spot.chain == "prerouting_last" and not policy.inbound.enabled:
        return "inbound redirection is off: nothing is redirected there anyway"
    if spot.part == "destination" and kind in ("negate", "drop a condition"):
        return None
    if spot.family is Family.IPV6 or "0.0.0.0" in spot.text:
        return "out of reach: no socket sends that to another host; tests/netns/test_loopback_from_outside.py does"
    if not policy.inbound.enabled and (spot.chain == "TPCTL_ARRIVING" or not policy.networks(Family.IPV4)):
        return "inbound redirection is off: nothing is redirected there anyway"
    if kind == "off by one" and spot.other == "wider":
        return "out of reach: nobody has, or sends to, an address that lies in between"
    return None


def _lists_loopback(policy: Policy) -> bool:
    return any(server.address.is_loopback for server in policy.dns.servers)


def _bound_elsewhere(policy: Policy, kind: str, spot: Spot) -> str | None:
    if spot.rule not in ("d1", "redirected, but bound to another interface") or spot.part in ("out", "interface"):
        return None
    return "every interface of a rehearsal leads to loopback; tests/netns/test_bound_sockets.py has one that does not"


def _answering_anyway(policy: Policy, kind: str, spot: Spot) -> str | None:
    if not {spot.rule, spot.other} & {"d5", "redirected DNS queries"}:
        return None
    return "the data plane of a rehearsal sees to it itself; tests/netns/test_bound_sockets.py has one that does not"


def _own_ports(policy: Policy, kind: str, spot: Spot) -> str | None:
    """What of g1 only broadcasts, connections that run, and rules of others could show."""
    if "g1" not in (spot.rule, spot.other):
        return None
    chain = spot.chain.lower()
    for_vnets = chain == "prerouting_first" and policy.virtual_networks
    if chain == "tpctl_arriving" and policy.inbound.include_ports:
        return "what it spares is not redirected there anyway"
    redirects_all = policy.inbound.enabled and not policy.inbound.include_ports
    if chain.startswith("prerouting") and not redirects_all and not for_vnets:
        return "what it spares is not redirected there anyway"
    if "fe80::/10" in spot.text and chain in ("guard", "tpctl_guard"):
        return "only a host with several links can show it; tests/netns/test_own_ports.py has one"
    if kind == "negate":
        return None
    if spot.part in ("SYN", "state"):
        return "it spares connections that run; tests/netns/test_own_ports.py has some"
    if spot.part == "local" and chain in ("guard_input", "input"):
        return "out of reach: nobody sends broadcasts, and whatever else gets there is for this host"
    if kind == "drop a condition" and spot.part == "out" and "tcp" in spot.text and _takes_all(policy):
        return "whatever an application opens elsewhere is redirected, and so translated"
    leaves_to_guard = chain.startswith("prerouting") or chain == "tpctl_arriving"
    if leaves_to_guard and (not redirects_all or spot.part == "local"):
        return None if for_vnets else "what it spares is not redirected there anyway"
    if kind == "swap two rules":
        return "no packet meets both rules" if {spot.rule, spot.other} & {"l1", "e1"} else None
    return None


def _takes_all(policy: Policy) -> bool:
    """Whether every connection that applications open elsewhere is redirected."""
    outbound = policy.outbound
    some = outbound.include_ports or outbound.exclude_ports or outbound.exclude_destinations or outbound.exclude_uids
    return outbound.enabled and not some and not policy.cgroup


_JUDGES: tuple[Judge, ...] = (
    _own_ports,
    _bound_elsewhere,
    _answering_anyway,
    _loopback_from_outside,
    _logging,
    _switched_off,
    _held_twice,
    _out_of_reach,
    _listener_itself,
    _no_server_between,
    _no_server,
    _transparent,
)


def _address(text: str) -> Address:
    return ip_address(text.partition("/")[0])


def spread(items: list[_One], most: int) -> Iterator[_One]:
    """So many of them, evenly from all over the list."""
    if len(items) <= most:
        yield from items
        return
    yield from (items[number * len(items) // most] for number in range(most))
