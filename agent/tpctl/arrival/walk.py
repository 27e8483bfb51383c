"""The way of a packet through the chains of a hook: which rules end it, translate it, or mark it. Pure.

The kernel asks each base chain in turn. To accept ends only that base chain; to drop ends everything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tpctl.arrival.packets import Matching, Packet, match
from tpctl.engines.foreign import ENDS, Chain, Place, Rule, Table, Verdict, base_chains

_DEEPEST = 16
"""Jumps that nf_tables allows (NFT_JUMP_STACK_SIZE in include/net/netfilter/nf_tables.h)."""


_EVERY_BIT = 0xFFFFFFFF
_GOES_ON = frozenset({Verdict.ACCEPT, Verdict.TRANSLATE, Verdict.MASQUERADE})
"""What ends a base chain, and lets the next one be asked."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A rule, or a policy, that acts on the packet."""

    place: Place
    verdict: Verdict
    extent: Matching
    """How many of the packets it acts on. What was dropped before is not counted out, what was accepted is."""


@dataclass(slots=True)
class _Way:
    """A packet on its way, and what has acted on it."""

    packet: Packet
    stops: list[Stop] = field(default_factory=list)


def stops(tables: Iterable[Table], packet: Packet, *, with_nat: bool = True) -> tuple[Stop, ...]:
    """What acts on a packet at its hook, in the kernel's order.

    Chains of nat only translate: without them a host of kube-proxy has thousands of rules less.
    """
    way = _Way(packet)
    left = Matching.ALL
    for table, chain in base_chains(tables, packet.hook, packet.family):
        first, last = packet.priorities
        if not first <= chain.priority <= last:
            continue
        if chain.kind == "nat" and (not with_nat or packet.is_reply or packet.is_translated):
            continue  # it is only asked about a connection's first packet, and no more once that is translated
        left = _base(way, table, chain, left)
        if left is Matching.NEVER:
            break
    return tuple(way.stops)


def _base(way: _Way, table: Table, chain: Chain, entering: Matching) -> Matching:
    """What goes on to the next base chain."""
    before = len(way.stops)
    left = _chain(way, table, (chain,), entering)
    accepted = max((one.extent for one in way.stops[before:] if one.verdict in _GOES_ON), default=Matching.NEVER)
    if chain.policy in ENDS and left:
        way.stops.append(Stop(Place(table, chain, None, (chain.name,)), chain.policy, left))
        return accepted
    return max(left, accepted)


def _chain(way: _Way, table: Table, path: tuple[Chain, ...], entering: Matching) -> Matching:
    """What comes back from the last chain of a path to whoever called it."""
    left, returned = entering, Matching.NEVER
    for rule in path[-1].rules:
        found = match(rule.conditions, way.packet)
        extent = min(found, left)
        if extent is Matching.NEVER or rule.verdict is Verdict.CONTINUE:
            continue
        if rule.verdict is Verdict.RETURN:
            returned = max(returned, extent)
            left = _rest(left, found)
        elif rule.verdict in (Verdict.JUMP, Verdict.GOTO):
            back = _called(way, table, path, rule, extent)
            if rule.verdict is Verdict.GOTO:
                returned, left = max(returned, back), _rest(left, found)
            elif back < extent:
                left = max(back, _rest(left, found))
        else:
            names = tuple(chain.name for chain in path)
            way.stops.append(Stop(Place(table, path[-1], rule, names), rule.verdict, extent))
            left = _after(way, rule, left, found)
        if left is Matching.NEVER:
            break
    return max(left, returned)


def _called(way: _Way, table: Table, path: tuple[Chain, ...], rule: Rule, entering: Matching) -> Matching:
    """What comes back from a chain that a rule jumps to; a target that is no chain (LOG, CT) ends nothing."""
    chain = table.chains.get(rule.target)
    if chain is None or chain in path or len(path) > _DEEPEST:
        return entering
    return _chain(way, table, (*path, chain), entering)


def _after(way: _Way, rule: Rule, left: Matching, found: Matching) -> Matching:
    """What is left behind a rule that has acted."""
    if rule.verdict is Verdict.MARK:
        mark = _marked(way.packet.mark, rule.text) if found is Matching.ALL else None
        way.packet = dataclasses.replace(way.packet, mark=mark)
        return left
    if rule.verdict is Verdict.UNTRACK or (rule.verdict in ENDS and found is not Matching.ALL):
        return left
    return _rest(left, found)


def _marked(mark: int | None, text: str) -> int | None:
    """The mark that a rule leaves, as iptables-save(8) and nft(8) write it; None where that cannot be told."""
    xor = re.search(r"-j MARK --set-xmark (0x[0-9a-f]+)(?:/(0x[0-9a-f]+))?", text)
    if xor:
        value, mask = int(xor[1], 16), int(xor[2] or "0xffffffff", 16)
        if mask == _EVERY_BIT:
            return value
        return None if mark is None else (mark & ~mask) ^ value
    plain = re.search(r"\bmark set (0x[0-9a-f]+)(?! *(?:[|&^]|x?or |and ))", text)
    return int(plain[1], 16) if plain and "ct mark set" not in text else None


def _rest(left: Matching, taken: Matching) -> Matching:
    """What can be said of the others, when those that a rule matches are gone."""
    return Matching.NEVER if taken is Matching.ALL else min(left, taken)
