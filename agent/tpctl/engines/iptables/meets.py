"""Whether a rule of other software can match a connection that a policy takes: found out by examples. Pure.

An example is a connection that the rule matches, as far as its criteria are known here, and `decide()` is asked about
it. A criterion that is not known (a mark, a set) is taken to match: what stands in the way now and then is in the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tpctl.engines.iptables.rule import Criterion, Match, Option, Rule
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide, zone
from tpctl.spec.exclusions import Interfaces
from tpctl.spec.policy import (
    DNS_PORT,
    MAX_PORT,
    Address,
    Family,
    Network,
    Policy,
    PortRange,
    UidRange,
    contains,
    includes,
)
from tpctl.spec.verdict import Action
from tpctl.spec.zones import DEFAULT_ZONE

_ELSEWHERE: dict[Family, tuple[Address, ...]] = {
    Family.IPV4: (ip_address("203.0.113.77"), ip_address("1.2.3.4")),
    Family.IPV6: (ip_address("2001:db8::77"), ip_address("2606::7")),
}
_HERE: dict[Family, Address] = {Family.IPV4: ip_address("192.0.2.1"), Family.IPV6: ip_address("2001:db8:1::1")}
"""Stands for this host's address while it has none."""
_PORTS = (8080, 443, 40001, 7)
_UIDS = (1000, 0, 4294967290)
_ANY_INTERFACES = ("eth0", "eth1")
_TCP, _UDP = "tcp", "udp"
_BY_MATCH = ("INPUT", "POSTROUTING")
"""Hooks at which our own jump says what it is there for, and not `decide()`: what comes here has been decided."""


@dataclass
class Asked:
    """What the rules on the way to a target ask of a connection, together."""

    possible: bool = True
    protocols: set[str] = field(default_factory=lambda: {_TCP, _UDP})
    sources: list[tuple[Network, bool]] = field(default_factory=list)
    """Each with whether it is negated; the same below."""
    destinations: list[tuple[Network, bool]] = field(default_factory=list)
    arrives_by: list[tuple[str, bool]] = field(default_factory=list)
    leaves_by: list[tuple[str, bool]] = field(default_factory=list)
    ports: list[tuple[tuple[PortRange, ...], bool]] = field(default_factory=list)
    source_ports: list[tuple[tuple[PortRange, ...], bool]] = field(default_factory=list)
    owners: list[tuple[UidRange, bool]] = field(default_factory=list)
    to_this_host: bool | None = None
    states: frozenset[str] = frozenset({"NEW"})
    """Those that the connection has in conntrack."""

    @classmethod
    def of(cls, rules: Iterable[Rule], states: Iterable[str]) -> Asked:
        """What these rules ask of a connection in these states."""
        asked = cls(states=frozenset(states))
        for rule in rules:
            asked._add(rule)
        return asked

    def _add(self, rule: Rule) -> None:
        if rule.protocol and rule.protocol not in ("all", "0"):
            self.protocols &= {{"6": _TCP, "17": _UDP}.get(rule.protocol, rule.protocol)}
        for criterion, networks in ((rule.source, self.sources), (rule.destination, self.destinations)):
            if criterion and (network := _network(criterion)) is not None:
                networks.append((network, criterion.negated))
        for criterion, names in ((rule.in_interface, self.arrives_by), (rule.out_interface, self.leaves_by)):
            if criterion:
                names.append((criterion.value, criterion.negated))
        for each in rule.matches:
            for option in each.options:
                self._add_option(each, option)

    def _add_option(self, of: Match, option: Option) -> None:
        value = option.values[0] if option.values else ""
        match option.name:
            case "dport" | "dports":
                self.ports.append((_ports(value), option.negated))
            case "sport" | "sports":
                self.source_ports.append((_ports(value), option.negated))
            case "ctstate" | "state":
                self.possible &= bool(self.states.intersection(value.split(","))) != option.negated
            case "dst-type" if value == "LOCAL":
                self.possible &= self.to_this_host in (None, not option.negated)
                self.to_this_host = not option.negated
            case "uid-owner" if uids := _uids(value):
                self.owners.append((uids, option.negated))
            case "tcp-flags" if len(option.values) == 2:
                mask, wanted = (set(flags.split(",")) for flags in option.values)
                self.possible &= (
                    (wanted - {"NONE"}) == ({"SYN"} if mask & {"SYN", "ALL"} else set())
                ) != option.negated
            case "syn" if of.name == _TCP:
                self.possible &= not option.negated


@dataclass(frozen=True, slots=True)
class Judge:
    """Knows what a policy takes of one family's connections on this host."""

    policy: Policy
    family: Family
    local: tuple[Network, ...] = ()
    """What the kernel delivers to this host (the table `local`)."""

    def taken(self, table: str, hook: str, protocols: Iterable[str], rules: Sequence[Rule]) -> Connection | None:
        """A connection that our rules at a hook of a table are there for, and that all of `rules` match.

        Our own jump may be among them; in the table filter, and where translation is over, it has to be.
        """
        asked = Asked.of(rules, ("NEW", "DNAT") if hook == "POSTROUTING" else ("NEW",))
        if not asked.possible:
            return None
        inbound = hook in ("PREROUTING", "INPUT")
        for protocol in sorted(asked.protocols.intersection(protocols)):
            found = (
                self._arriving(asked, protocol, answers=table == "raw")
                if inbound
                else self._leaving(asked, protocol, hook == "POSTROUTING")
            )
            for connection in found:
                if hook in _BY_MATCH or table == "filter" or self._takes(table, connection):
                    return connection
        return None

    def is_here(self, address: Address) -> bool:
        """Whether an address is this host's."""
        return address.is_loopback or contains(self.local, address)

    def _takes(self, table: str, connection: Connection) -> bool:
        if table == "raw":
            return zone(self.policy, connection) != DEFAULT_ZONE
        return decide(self.policy, connection).action is Action.REDIRECT

    def _arriving(self, asked: Asked, protocol: str, answers: bool) -> Iterator[Connection]:
        networks = self.policy.networks(self.family)
        usual = [*_ANY_INTERFACES, *(_name(network.interface) for network in networks)]
        names = [name for name in _names(asked.arrives_by, usual) if name != self.policy.loopback]
        servers = [server.address for server in self.policy.servers(self.family)] if answers else []
        sources = self._addresses(asked.sources, [*servers, *_ELSEWHERE[self.family]])
        targets = [each for each in self._targets(asked, (_ELSEWHERE[self.family][1],)) if not each.is_loopback]
        from_ports = _among(asked.source_ports, [DNS_PORT]) if answers else [None]
        for name, source, target, port, from_port in itertools.product(
            names, sources, targets, self._ports(asked, inbound=True), from_ports
        ):
            yield Connection(
                Direction.INBOUND, protocol, source, target, port, name,
                source_port=from_port, local_destination=self.is_here(target) or target == _HERE[self.family],
            )  # fmt: skip

    def _leaving(self, asked: Asked, protocol: str, of_bridges: bool) -> Iterator[Connection]:
        """`of_bridges` says that a rule for one network is there for what a bridge forwards: Docker's MASQUERADE."""
        servers = tuple(server.address for server in self.policy.servers(self.family))
        loopback, group = self.policy.loopback, self.policy.cgroup
        uids = [uid for uid in (*_UIDS, self.policy.proxy_uid, *(uids.first for uids, no in asked.owners if not no))
                if all((uid in uids) != negated for uids, negated in asked.owners)]  # fmt: skip
        sources = self._addresses(asked.sources, self._own())
        if not sources or (of_bridges and not all(each in sources for each in self._own())):
            return
        own = sources[0]
        targets = self._targets(asked, (*servers, *_ELSEWHERE[self.family]))
        for target, uid, port in itertools.product(targets, uids, self._ports(asked, inbound=False)):
            usual = [loopback] if self.is_here(target) or target == _HERE[self.family] else [*_ANY_INTERFACES]
            for name in [
                name for name in _names(asked.leaves_by, usual) if (name == loopback) == (usual == [loopback])
            ]:
                yield Connection(
                    Direction.OUTBOUND, protocol, own, target, port, name, uid=uid, cgroup=group.path if group else None
                )

    def _own(self) -> list[Address]:
        mine = [network.network_address for network in self.local if not network.network_address.is_loopback]
        return mine[:4] or [_HERE[self.family]]

    def _targets(self, asked: Asked, elsewhere: Sequence[Address]) -> list[Address]:
        """Destinations that fit, this host's own among them."""
        found = self._addresses(asked.destinations, [*self._own(), *elsewhere])
        if asked.to_this_host is None:
            return found
        here = _HERE[self.family]
        return [address for address in found if (self.is_here(address) or address == here) == asked.to_this_host]

    def _addresses(self, asked: Sequence[tuple[Network, bool]], usual: Sequence[Address]) -> list[Address]:
        """Addresses that fit: in every network that is asked for, and in none that is ruled out."""
        wanted = [network for network, negated in asked if not negated]
        choice = list(usual)
        for network in wanted:
            within = (each.network_address for each in self.local if each.version == network.version)
            choice += [address for address in within if address in network]
            choice += [network.network_address, network[1] if network.num_addresses > 1 else network[0]]
        fitting = (
            address
            for address in choice
            if all(address in network for network in wanted)
            and not any(address in network for network, negated in asked if negated)
        )
        return list(dict.fromkeys(fitting))

    def _ports(self, asked: Asked, *, inbound: bool) -> list[int]:
        of = self.policy.inbound if inbound else self.policy.outbound
        usual = [*(ports.first for ports in of.include_ports), *_PORTS, DNS_PORT]
        excluded = () if of.include_ports else of.exclude_ports
        beside = (edge for ports in excluded for edge in (ports.first - 1, ports.last + 1) if 0 < edge <= MAX_PORT)
        return _among(asked.ports, [*usual, *beside])


def _among(asked: Sequence[tuple[tuple[PortRange, ...], bool]], usual: Sequence[int]) -> list[int]:
    """Ports that fit; the edges of ranges are among them."""
    edges = [edge for ports, negated in asked if not negated for each in ports for edge in (each.first, each.last)]
    return list(
        dict.fromkeys(
            port for port in (*usual, *edges) if all(includes(ports, port) != negated for ports, negated in asked)
        )
    )


def _names(asked: Sequence[tuple[str, bool]], usual: Sequence[str]) -> list[str]:
    """Names of interfaces that fit."""
    choice = [*usual, *(_name(pattern) for pattern, negated in asked if not negated)]
    fits = (name for name in choice if all((name in Interfaces(pattern)) != negated for pattern, negated in asked))
    return list(dict.fromkeys(fits))


def _name(pattern: str) -> str:
    """An interface's name that a pattern of iptables(8) matches."""
    return f"{pattern[:-1]}0" if pattern.endswith("+") else pattern


def _network(criterion: Criterion) -> Network | None:
    try:
        return ip_network(criterion.value, strict=False)
    except ValueError:  # a mask with holes
        return None


def _ports(value: str) -> tuple[PortRange, ...]:
    """Port ranges as iptables-save writes them; 0 is no port that a connection goes to."""
    found = []
    for part in value.split(","):
        first, colon, last = part.partition(":")
        try:
            low = max(int(first or 0), 1)
            found.append(PortRange(low, int(last or MAX_PORT) if colon else low))
        except ValueError:
            return (PortRange(1, MAX_PORT),)
    return tuple(found)


def _uids(value: str) -> UidRange | None:
    first, _, last = value.partition("-")
    try:
        return UidRange(int(first), int(last or first))
    except ValueError:
        return None
