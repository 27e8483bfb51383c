"""What the rules of every table are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tpctl.engines.iptables.rule import COMMENT_LIMIT, Criterion, Match, Option, Rule, match
from tpctl.spec.exclusions import Interfaces
from tpctl.spec.policy import (
    DNS_PORT,
    LINK_LOCAL6,
    RESERVED,
    THIS_HOST,
    DnsCapture,
    Family,
    NameServer,
    Network,
    Policy,
    PortRange,
    Ports,
    Protocol,
    UidRange,
    includes,
    of_family,
    text_of,
)
from tpctl.system.errors import InputError

COMMENT_PREFIX = "tpctl/"
CGROUP_PATH_LIMIT = 511
"""Bytes of a control group's path, XT_CGROUP_PATH_SIZE - 1 in include/uapi/linux/netfilter/xt_cgroup.h."""
MULTIPORT_SLOTS = 15
"""XT_MULTI_PORTS in include/uapi/linux/netfilter/xt_multiport.h; a range takes two."""

SYN = match("tcp", Option("tcp-flags", ("FIN,SYN,RST,ACK", "SYN")))
"""Only a connection's first segment is redirected: on a host whose conntrack was idle, running connections look new."""


@dataclass(frozen=True, slots=True)
class Jump:
    """A rule in a built-in chain."""

    chain: str
    rule: Rule
    position: int | None = None
    """1 is the top of the chain; None is its end."""


@dataclass(frozen=True, slots=True)
class TableRules:
    """What one table should hold of ours."""

    table: str
    chains: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
    jumps: tuple[Jump, ...] = ()


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """What one family should hold of ours. The order of the tables is the order in which they are applied."""

    family: Family
    tables: tuple[TableRules, ...]


def port_matches(protocol: Protocol, ports: Ports) -> Iterator[Match]:
    """Matches that together cover the destination ports, each small enough for one rule."""
    if len(ports) == 1:
        yield match(protocol, ("dport", _port_text(ports)))
        return
    slots = 0
    chunk: list[PortRange] = []
    for port in ports:
        size = 1 if port.first == port.last else 2
        if slots + size > MULTIPORT_SLOTS:
            yield match("multiport", ("dports", _port_text(chunk)))
            slots, chunk = 0, []
        slots += size
        chunk.append(port)
    if chunk:
        yield match("multiport", ("dports", _port_text(chunk)))


def _port_text(ports: Iterable[PortRange]) -> str:
    return ",".join(str(port).replace("-", ":") for port in ports)


def owned_by(uids: object, *, negated: bool = False) -> Match:
    """Matches packets whose socket was created by one of the uids; negated, also those that have no socket."""
    return match("owner", Option("uid-owner", (str(uids),), negated))


def address(network: Network) -> Criterion:
    """A source or destination."""
    return Criterion(text_of(network))


def within(network: Network) -> Criterion | None:
    """The addresses of a network; None when that is every address, for iptables-save leaves such a match out."""
    return address(network) if network.prefixlen else None


def comment(text: str) -> str:
    """A rule's comment, cut to what the kernel keeps."""
    return (COMMENT_PREFIX + text).encode()[: COMMENT_LIMIT - 1].decode(errors="ignore")


def dport(protocol: Protocol, port: int) -> Match:
    """Matches one destination port."""
    return match(protocol, ("dport", str(port)))


class Parts:
    """What the tables of one family have in common."""

    def __init__(self, policy: Policy, family: Family) -> None:
        self.policy = policy
        self.family = family
        self.reserved = RESERVED[family]
        self.host_length = 32 if family is Family.IPV4 else 128

    def captured_servers(self) -> Iterator[dict[str, Any]]:
        """The criteria of each captured server; nothing at all stands for every server."""
        if self.policy.dns.capture is DnsCapture.ALL:
            yield {}
            return
        for server in self.policy.servers(self.family):
            yield {"destination": self.host(server)}

    def host(self, server: NameServer) -> Criterion:
        """A name server's address as a criterion."""
        return Criterion(f"{server.address}/{self.host_length}")

    def inside(self) -> tuple[Match, ...]:
        """Matches packets of sockets that were made in the policy's control group; nothing when there is none.

        What has no socket is outside: the match (xt_cgroup.c) lets it pass neither as it is nor negated, so the rules
        ask only whether a packet is inside. The path is what the kernel found when the rule was made: a group that is
        made anew under the same path is another one.
        """
        cgroup = self.policy.cgroup
        if cgroup is None:
            return ()
        if len(cgroup.path.encode()) > CGROUP_PATH_LIMIT:
            raise InputError(
                f"the path of the control group {cgroup} is longer than iptables can hold ({CGROUP_PATH_LIMIT} bytes); "
                "use --engine nftables"
            )
        return (match("cgroup", ("path", cgroup.path)),)

    @property
    def whose(self) -> str:
        """What a comment adds to a rule with the match `inside`."""
        return f": c1, of the cgroup {self.policy.cgroup}" if self.policy.cgroup else ""

    def excluded_destinations(self) -> Iterator[Network]:
        """Those of this family."""
        return of_family(self.policy.outbound.exclude_destinations, self.family)

    def dns_excluded_uids(self) -> Iterator[UidRange]:
        """The users whose DNS queries are left alone."""
        for exclusion in self.policy.outbound.exclude_uids:
            if exclusion.protocol is Protocol.UDP and includes(exclusion.ports, DNS_PORT):
                yield exclusion.uids

    def scoped_destinations(self) -> Iterator[Rule]:
        """The rule that spares what cannot be redirected."""
        if self.family is Family.IPV6:
            yield self.leave("s1: link-local destinations", destination=address(LINK_LOCAL6))

    def from_outside(self) -> Iterator[Rule]:
        """The rules that spare what arrives by another interface than loopback for a loopback address."""
        away = Criterion(self.policy.loopback, negated=True)
        for network in THIS_HOST[self.family]:
            text = "l1: loopback addresses are left to the kernel"
            yield self.leave(text, in_interface=away, destination=address(network))

    def excluded_arrivals(self) -> Iterator[Rule]:
        """The rules that spare what arrives by an excluded interface."""
        for excluded in self.policy.exclude_interfaces:
            text = f"e1: excluded interface {excluded}"
            yield self.leave(text, in_interface=Criterion(excluded.pattern))

    def excluded_members(self) -> Iterator[Rule]:
        """Those of them that a virtual network may arrive by."""
        networks = [Interfaces(vnet.interface) for vnet in self.policy.networks(self.family)]
        for rule, excluded in zip(self.excluded_arrivals(), self.policy.exclude_interfaces, strict=True):
            if any(excluded.meets(each) for each in networks):
                yield rule

    def excluded_departures(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Criteria for what leaves by an excluded interface, or has an excluded mark, each with its rule's comment."""
        for excluded in self.policy.exclude_interfaces:
            yield f"e1: excluded interface {excluded}", {"out_interface": Criterion(excluded.pattern)}
        for mark in self.policy.outbound.exclude_marks:
            yield f"m1: excluded mark {mark}", {"matches": (match("mark", ("mark", str(mark))),)}

    def leave(self, text: str, **criteria: Any) -> Rule:
        """A rule that leaves the chain, so that the packet goes on as if tpctl were not there."""
        return Rule("RETURN", comment=comment(text), **criteria)

    def redirect(self, protocol: Protocol, port: int, text: str, **criteria: Any) -> Rule:
        """A rule that sends the connection to a port of this host."""
        options = (Option("to-ports", (str(port),)),)
        return Rule("REDIRECT", protocol=protocol, target_options=options, comment=comment(text), **criteria)

    def translate(self, protocol: Protocol, port: int, text: str) -> Rule:
        """A rule that sends the connection to another port of the address it was going to."""
        options = (Option("to-destination", (f":{port}",)),)
        return Rule("DNAT", protocol=protocol, target_options=options, comment=comment(text))
