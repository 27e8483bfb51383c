"""Filters on an application's port that connections no longer meet, because the port is another by then. Pure.

fail2ban and firewalls refuse a banned host on the port of the service, at the hook input. A redirect comes before, and
makes the data plane's port of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from tpctl.arrival import journey, walk
from tpctl.arrival.journey import Trip
from tpctl.arrival.owners import Owner, owner_of
from tpctl.arrival.packets import Matching, Packet, ports_of
from tpctl.engines.foreign import ENDS, Chain, Hook, Place, Rule, Table, base_chains
from tpctl.spec.policy import Policy, PortRange, includes

_BANNING = frozenset({Owner.FAIL2BAN, Owner.CROWDSEC})
_PORT = "destination_port"
_READ = frozenset({_PORT, "protocol", "family", "state", "in_interface", "syn"})


def bypassed(tables: Sequence[Table], policy: Policy) -> tuple[Place, ...]:
    """Rules that refuse somebody on a port whose connections are redirected before they are asked, each once."""
    if not policy.inbound.enabled or policy.inbound.is_transparent:
        return ()
    found: dict[str, Place] = {}
    for family in sorted(policy.families):
        for table, chain in base_chains(tables, Hook.INPUT, family):
            if chain.kind == "filter":
                for place in _in_chain(table, (chain,), policy):
                    found.setdefault(place.text, place)
    return tuple(found.values())


def loosened(tables: Sequence[Table], trips: Iterable[Trip]) -> Iterator[Place]:
    """What refuses connections at the hook input, whatever their port, and none any more once they are redirected."""
    for trip in trips:
        refusing = journey.counterparts(trip).get((Hook.INPUT, False))
        redirected = [packet for packet in journey.packets(trip) if packet.hook is Hook.INPUT and not packet.is_reply]
        if refusing is None or not redirected:
            continue
        left = [*_refusals(tables, redirected[0], Matching.PERHAPS)]
        if any(stop.extent is Matching.ALL for stop in left):
            continue  # nobody gets through
        still = {stop.place.text for stop in left}
        for stop in reversed([*_refusals(tables, refusing, Matching.SOME)]):  # the last is what refuses the rest
            rule = stop.place.rule
            if stop.place.text not in still and not (rule and any(one.field == _PORT for one in rule.conditions)):
                yield stop.place


def _refusals(tables: Sequence[Table], packet: Packet, least: Matching) -> Iterator[walk.Stop]:
    found = walk.stops(tables, packet, with_nat=False)
    return (stop for stop in found if stop.verdict in ENDS and stop.extent >= least)


def _in_chain(table: Table, path: tuple[Chain, ...], policy: Policy) -> Iterator[Place]:
    for rule in path[-1].rules:
        place = Place(table, path[-1], rule, tuple(chain.name for chain in path))
        called = table.chains.get(rule.target)
        if _is_about_redirected_port(rule, policy):
            if (rule.verdict in ENDS or (called is not None and _bans(table, called, place))) and not _is_usual(place):
                yield place
        elif called is not None and called not in path:
            yield from _in_chain(table, (*path, called), policy)


def _is_usual(place: Place) -> bool:
    """Whether it only refuses everybody where its base chain does that anyway; ufw does so to keep its log short."""
    rule = place.rule
    if rule is None or place.base.policy not in ENDS or owner_of(place) in _BANNING:
        return False
    return not any(one.field == "source" or one.field not in _READ for one in rule.conditions)


def _is_about_redirected_port(rule: Rule, policy: Policy) -> bool:
    """Whether the rule names a port, other than the data plane's, whose connections are redirected.

    Rules that only see other protocols, or what comes over lo, are not meant: that is not redirected on its way in.
    """
    if any(one.field == "protocol" and "tcp" not in one.values and not one.negated for one in rule.conditions):
        return False
    if any(
        one.field == "in_interface" and one.values == (policy.loopback,) and not one.negated for one in rule.conditions
    ):
        return False
    named = [one for one in rule.conditions if one.field == _PORT and not one.negated]
    ranges = [found for one in named for value in one.values if (found := ports_of(value)) is not None]
    return any(_is_redirected(ports, policy) for ports in ranges)


def _is_redirected(ports: PortRange, policy: Policy) -> bool:
    inbound = policy.inbound
    if (ports.first == 1 and ports.last == 65535) or inbound.port in ports:
        return False  # asked about the data plane's port as well
    if inbound.include_ports:
        return any(ports.first <= each.last and each.first <= ports.last for each in inbound.include_ports)
    return not (includes(inbound.exclude_ports, ports.first) and includes(inbound.exclude_ports, ports.last))


def _bans(table: Table, chain: Chain, place: Place, depth: int = 0) -> bool:
    """Whether a chain is one that bans are put into, be there any or not, or refuses somebody."""
    if owner_of(dataclasses.replace(place, chain=chain, path=(*place.path, chain.name))) in _BANNING:
        return True
    called = (table.chains.get(rule.target) for rule in chain.rules)
    return any(rule.verdict in ENDS for rule in chain.rules) or (
        depth < 8
        and any(one is not None and one is not chain and _bans(table, one, place, depth + 1) for one in called)
    )
