"""Rules of others that keep redirected connections, or answers to them, from conntrack. Pure.

NOTRACK is a common remedy for a full conntrack table (name servers, the DNS cache of a Kubernetes node). Without
conntrack nothing is translated: what leaves, or arrives, goes past the data plane, and an answer keeps the data plane's
address.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address

from tpctl.arrival import obstacles
from tpctl.arrival.journey import Trip, Way, of_connection
from tpctl.arrival.obstacles import Obstacle
from tpctl.arrival.owners import Owner
from tpctl.arrival.packets import Matching, networks_of, ports_of
from tpctl.engines.foreign import Rule, Table, Verdict
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import Address, Family, Policy
from tpctl.spec.verdict import Action

_ELSEWHERE: dict[Family, Address] = {
    Family.IPV4: ip_address("203.0.113.77"),
    Family.IPV6: ip_address("2001:db8::77"),
}
_PORTS = (443, 8080)
_UID = 1000
_CLIENT_PORT = 51234
"""Stands for any port that the kernel chooses."""
_MOST_RULES, _MOST_VALUES, _MOST_SHOWN = 32, 8, 5


def problems(
    tables: Sequence[Table], policy: Policy, engine: str, kinds: Iterable[Trip], is_local: Callable[[Address], bool]
) -> tuple[str, ...]:
    """A line for each such rule that an example shows to be in the way. `is_local` tells this host's addresses."""
    holding = [table for table in tables if any(_rules((table,)))]
    if not holding:
        return ()
    found: dict[str, str] = {}
    for trip in kinds:
        for rule in itertools.islice(_rules(holding), _MOST_RULES if trip.way is Way.NAT else 0):
            for example in _examples(policy, trip, rule, is_local):
                found |= {one.place.text: _problem(one) for one in _in_the_way(holding, policy, engine, example)}
    return tuple(itertools.islice(found.values(), _MOST_SHOWN))


def _rules(tables: Iterable[Table]) -> Iterator[Rule]:
    for table in tables:
        for chain in table.chains.values():
            yield from (rule for rule in chain.rules if rule.verdict is Verdict.UNTRACK)


def _in_the_way(tables: Sequence[Table], policy: Policy, engine: str, example: Connection) -> Iterator[Obstacle]:
    decision = decide(policy, example)
    if decision.action is not Action.REDIRECT:
        return
    trip = of_connection(example, decision, engine, policy.proxy_uid)
    for one in obstacles.on_the_way(tables, trip, with_nat=False):
        if one.verdict is Verdict.UNTRACK and one.extent >= Matching.SOME:
            yield one


def _examples(policy: Policy, trip: Trip, rule: Rule, is_local: Callable[[Address], bool]) -> Iterator[Connection]:
    """Connections of a kind that a rule may match."""
    asked: dict[str, list[str]] = {}
    for condition in rule.conditions:
        if not condition.negated:
            asked.setdefault(condition.field, []).extend(condition.values[:_MOST_VALUES])
    ranges = (ports_of(value) for value in asked.get("destination_port", ()))
    ports = [each.first for each in ranges if each is not None] if trip.port is None else [trip.port]
    arrives = trip.direction is Direction.INBOUND
    servers = [server.address for server in policy.servers(trip.family)]
    sources = [*_among(asked, "source", trip.family), _ELSEWHERE[trip.family]] if arrives else [*trip.sources]
    targets = (
        [*trip.destinations]
        if trip.destinations
        else [*servers, *_among(asked, "destination", trip.family), _ELSEWHERE[trip.family]]
    )
    for source, target, port in itertools.product(sources, targets, [*ports, *(_PORTS if trip.port is None else ())]):
        interface = policy.loopback if not arrives and is_local(target) else trip.interface or policy.loopback
        yield Connection(
            trip.direction, trip.protocol, source, target, port, interface, _CLIENT_PORT,
            uid=None if arrives else _UID, cgroup=policy.cgroup.path if policy.cgroup else None,
            local_destination=not trip.is_forwarded,
        )  # fmt: skip


def _among(asked: dict[str, list[str]], field: str, family: Family) -> Iterator[Address]:
    for value in asked.get(field, ()):
        for network in (networks_of(value) or ())[:1]:
            if network.version == family:
                yield network[1] if network.num_addresses > 1 else network[0]


def _problem(found: Obstacle) -> str:
    owner = "a rule" if found.owner is Owner.ADMINISTRATOR else f"a rule of {found.owner}"
    packet = found.packet
    if packet.is_reply:
        what, end = "answers of redirected connections", "they are lost"
    else:
        what, end = f"connections to {packet.protocol} port {packet.destination_port}", "they go past the data plane"
    return (
        f"{owner} {obstacles.HIDES.format(what)}, and {end}: {found.place.text}; "
        "exclude such connections in the policy, remove the rule, use --engine ebpf, or exempt them first: "
        f"{obstacles.advice(found)}"
    )
