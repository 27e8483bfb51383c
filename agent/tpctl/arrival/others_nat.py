"""Where rules of somebody else's send a connection: rule by rule, through the tables that translate. Pure.

For a host on which kumactl's rules are installed, of which there is no policy that could be asked. Only the nat tables
are walked: what raw and mangle do (conntrack zones, invalid packets) is not told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tpctl.arrival.journey import Trip, packets
from tpctl.arrival.packets import Matching, Packet, match
from tpctl.engines.foreign import Chain, Rule, Table, base_chains
from tpctl.engines.foreign import Verdict as Does
from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.verdict import Action, Step, Verdict

_TO_PORT = re.compile(r"--to-ports (\d+)|--to-destination \S*:(\d+)|\bto :(\d+)")
_ENDS = {Does.TRANSLATE: Action.REDIRECT, Does.ACCEPT: Action.PASS, Does.DROP: Action.DROP, Does.REJECT: Action.RESET}
_DEEPEST = 16
"""Jumps that nf_tables allows (NFT_JUMP_STACK_SIZE in include/net/netfilter/nf_tables.h)."""


@dataclass(slots=True)
class _Way:
    packet: Packet
    steps: list[Step] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    """Rules of which nobody here can tell whether they match; they are taken not to."""
    end: Rule | None = None


def decided(tables: Iterable[Table], connection: Connection) -> tuple[Verdict, tuple[str, ...]]:
    """What the rules do with a connection, with each that is asked; and those that nobody here can answer."""
    if connection.state is not State.NEW:
        step = Step("nat", "only a connection's first packet is translated", True)
        return Verdict(Action.PASS, None, 0, (step,)), ()
    way = _Way(next(iter(packets(_trip(connection)))))
    for table, chain in base_chains(tables, way.packet.hook, way.packet.family):
        if chain.kind == "nat" and _walk(way, table, (chain,)):
            break
    return _verdict(way), tuple(way.unsure)


def _trip(connection: Connection) -> Trip:
    inbound = connection.direction is Direction.INBOUND
    return Trip(
        connection.direction, connection.family, connection.protocol, connection.interface, connection.destination_port,
        () if connection.source.is_unspecified else (connection.source,), (connection.destination,),
        connection.source_port, connection.uid, is_forwarded=inbound and not connection.local_destination,
        mark=connection.mark,
    )  # fmt: skip


def _verdict(way: _Way) -> Verdict:
    if way.end is None:
        way.steps.append(Step("nat", "no rule translates it", True))
        return Verdict(Action.PASS, None, 0, tuple(way.steps))
    found = _TO_PORT.search(way.end.text)
    port = int(next(filter(None, found.groups()))) if found else None
    return Verdict(_ENDS[way.end.verdict], port, 0, tuple(way.steps))


def _walk(way: _Way, table: Table, path: tuple[Chain, ...]) -> bool:
    """Ask the last chain of a path; whether that was the end of it."""
    for rule in path[-1].rules:
        found = match(rule.conditions, way.packet)
        applies = found in (Matching.ALL, Matching.SOME)
        way.steps.append(Step(path[-1].name, rule.text, applies))
        if found is Matching.PERHAPS:
            way.unsure.append(f"{path[-1].name}: {rule.text}")
        if not applies:
            continue
        if rule.verdict in _ENDS:
            way.end = rule
            return True
        if rule.verdict is Does.RETURN:
            return False
        called = table.chains.get(rule.target) if rule.verdict in (Does.JUMP, Does.GOTO) else None
        if called is not None and called not in path and len(path) < _DEEPEST and _walk(way, table, (*path, called)):
            return True
        if rule.verdict is Does.GOTO:
            return False
    return False
