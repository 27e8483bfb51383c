"""Where our jumps stand among the rules of other software, and where they belong. Pure.

A packet leaves a built-in chain at the first rule that ends it, so the place of a jump is part of what it means:

- A jump that belongs to the top (docs/ruleset.md) stands before every rule that ends the chain for what it takes.
- Any other comes after the rules of others that translate connections, as Docker's published ports, and after the
  chains in which they may begin to, whoever was started first. But it stands before rules that only end the chain
  (ACCEPT, RETURN): those would keep connections from the data plane, and lose nothing to it that they do.
- Where such a rule stands before one that translates, no place is right for both. Then a second jump stands before it,
  for what it matches alone: nobody behind it would have seen that.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from tpctl.engines.iptables import tproxy
from tpctl.engines.iptables.guard import GUARD, GUARD_OWN
from tpctl.engines.iptables.meets import Judge
from tpctl.engines.iptables.parts import Jump, TableRules
from tpctl.engines.iptables.rule import Match, Rule, options_of, parse, split
from tpctl.engines.iptables.ruleset import ARRIVING, DNS, DNS_SOURCE, OUTBOUND, VIRTUAL_NETWORKS
from tpctl.engines.iptables.saved import SavedRule, SavedTable, owner_of_chain, owner_of_rule
from tpctl.engines.iptables.zones import ZONE_INBOUND, ZONE_OUTBOUND
from tpctl.spec.connection import Connection

PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    ARRIVING: ("tcp",),
    OUTBOUND: ("tcp",),
    DNS: ("udp",),
    VIRTUAL_NETWORKS: ("tcp", "udp"),
    tproxy.HAND_OVER: ("tcp",),
    tproxy.INBOUND: ("tcp",),
    ZONE_INBOUND: ("udp",),
    ZONE_OUTBOUND: ("udp",),
    GUARD: ("tcp", "udp"),
    GUARD_OWN: ("tcp", "udp"),
    DNS_SOURCE: ("udp",),
}
"""Of the jumps whose place matters, what they are there for."""
FIRST_FLAGS = {
    "PREROUTING": "--redirect-inbound-insert-instead-of-append",
    "OUTPUT": "--redirect-outbound-insert-instead-of-append",
}
"""What lets our rules at a hook come first."""
_TRANSLATING = frozenset({"REDIRECT", "DNAT", "NETMAP", "TPROXY", "BALANCE", "SAME"})
_ENDING = frozenset({"ACCEPT", "RETURN", "QUEUE", "NFQUEUE", "SNAT", "MASQUERADE"})
_MOST_TARGETS = 100
"""Of one rule of a built-in chain; kube-proxy's lead to thousands. What is beyond is taken to match nothing."""
_MOST_SHOWN = 160
_MOST_OVERTAKING = 8
_MOST_FOUND = 64


class Kind(enum.Enum):
    """What a rule of others may do to a connection that ours is there for."""

    TRANSLATES = "translates"
    ENDS = "ends the chain for"
    OPEN = "leads to a chain for"
    """It does nothing to it today, but leads to a chain in which others may put what does."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A rule of others in a built-in chain that may keep a connection from a jump of ours."""

    place: int
    """Among the rules of others in the chain, from 1."""
    rule: SavedRule
    kind: Kind
    met: Connection
    """An example."""
    target: str
    """What does it, at the end of the way from the rule."""
    stays: bool = True
    """Of what translates: whether the connection still ends on this host, or was opened by it."""
    ways: tuple[tuple[Rule, ...], ...] = ()
    """Of what ends the chain: the rules on each way to that."""

    def __str__(self) -> str:
        text = self.rule.text if len(self.rule.text) <= _MOST_SHOWN else f"{self.rule.text[:_MOST_SHOWN]}..."
        by = "" if f"-j {self.target}" in self.rule.text or self.kind is Kind.OPEN else f" by {self.target}"
        port = f" port {self.met.destination_port}"
        return f"`-A {self.rule.chain} {text}`, which {self.kind.value} {self.met.protocol}{port}{by}"


_found: dict[tuple[int, str, Rule, Judge], tuple[SavedTable, list[Standing]]] = {}
"""What was found before of a table that has been read, which is kept so that no other gets its id: placing our jumps,
and telling of their places, ask the same."""


def placed(table: SavedTable, wanted: TableRules, judge: Judge) -> TableRules:
    """`wanted` with the places of its jumps among the rules of others in the table."""
    jumps: list[Jump] = []
    for jump in wanted.jumps:
        if jump.position is None and _protocols(jump):
            found = _standings(table, jump, judge)
            place = _belongs(found)
            spots = [(each.place, rule) for each in found for rule in _overtaking(jump.rule, each, place)]
            spots += [(place, jump.rule)] if place is not None else []
            for spot, rule in spots:
                above = sum(1 for each in jumps if each.chain == jump.chain and each.position is not None)
                jumps.append(Jump(jump.chain, rule, spot + above))
            if place is not None:
                continue
        jumps.append(jump)
    return replace(wanted, jumps=tuple(jumps))


def _overtaking(ours: Rule, standing: Standing, place: int | None) -> tuple[Rule, ...]:
    """What stands before a rule that ends the chain where our jump itself has to stand behind it."""
    if standing.kind is not Kind.ENDS or (place is not None and place <= standing.place):
        return ()
    rules = [_both(ours, way) for way in standing.ways[:_MOST_OVERTAKING]]
    if len(standing.ways) > _MOST_OVERTAKING or None in rules:
        return ()
    return tuple(dict.fromkeys(rule for rule in rules if rule is not None))


def _both(ours: Rule, way: Sequence[Rule]) -> Rule | None:
    """Our jump for what the rules of a way match; None where one rule cannot say that."""
    made = ours
    for rule in way:
        for name in ("protocol", "source", "destination", "in_interface", "out_interface"):
            asked, held = getattr(rule, name), getattr(made, name)
            if held is None:
                made = replace(made, **{name: asked})
            elif asked not in (None, held):
                return None
        matches = {each.name: each.options for each in made.matches}
        for each in rule.matches:
            held = matches.get(each.name, ())
            if {option.name for option in held} & {option.name for option in each.options if option not in held}:
                return None
            # As iptables-save has them: ports come before flags.
            matches[each.name] = (*(option for option in each.options if option not in held), *held)
        made = replace(made, matches=tuple(Match(name, options) for name, options in matches.items()))
    return made


def misplaced(table: SavedTable, wanted: TableRules, judge: Judge) -> Iterator[str]:
    """What stands on the wrong side of a jump of ours, and why; `placed` puts it right."""
    above: Counter[str] = Counter()
    for jump in placed(table, wanted, judge).jumps:
        end = len(_others(table, jump.chain))
        belongs = end if jump.position is None else jump.position - 1 - above[jump.chain]
        above[jump.chain] += jump.position is not None
        if not _protocols(jump):
            continue
        is_plain = jump.rule in {each.rule for each in wanted.jumps}
        at = _place_of(table, jump)
        if at is None and not is_plain:  # it stands nowhere yet: before the rule that it is for
            at = end
        if at is None:
            continue
        where, ours = f"{table.name} {jump.chain}", f"tpctl's jump to {jump.rule.target}"
        for each in _standings(table, jump, judge):
            if not is_plain and each.place != belongs + 1:
                continue
            if belongs < each.place <= at and each.kind is not Kind.OPEN:
                yield f"{where}: {ours} stands behind a rule that belongs after it: {each}"
            elif at < each.place <= belongs and each.kind is not Kind.ENDS:
                yield f"{where}: {ours} stands before a rule that belongs before it: {each}"


def ahead(table: SavedTable, wanted: TableRules, judge: Judge) -> Iterator[str]:
    """What keeps connections from our jumps where these stand right; only whoever owns the rules can change that."""
    for jump in wanted.jumps:
        if jump.position is not None or not _protocols(jump):
            continue
        found = _standings(table, jump, judge)
        place = _belongs(found)
        for each in found:
            if place is not None and each.place >= place:
                continue
            overtaken = bool(_overtaking(jump.rule, each, place))
            if (each.kind is Kind.ENDS and not overtaken) or (each.kind is Kind.TRANSLATES and each.stays):
                yield (
                    f"{table.name} {jump.chain}: {each}: rules of others come first, and such connections go past the "
                    "data plane; exclude them in the policy, take the rule away, or let tpctl's rules come first "
                    f"({FIRST_FLAGS[jump.chain]})"
                )


def translating(table: SavedTable, chain: str, protocols: Sequence[str], judge: Judge) -> Iterator[Standing]:
    """The rules of others in a built-in chain that translate what the policy takes."""
    return (each for each in _judged(table, chain, protocols, judge, ()) if each.kind is Kind.TRANSLATES)


def _protocols(jump: Jump) -> tuple[str, ...]:
    return PROTOCOLS.get(jump.rule.target, ())


def _belongs(found: Sequence[Standing]) -> int | None:
    """Before which of the rules of others, counted from 1, a jump belongs that is not at the top; None is the end."""
    ends = [each.place for each in found if each.kind is Kind.ENDS]
    after = max((each.place for each in found if each.kind is Kind.TRANSLATES), default=0)
    opens = max((each.place for each in found if each.kind is Kind.OPEN), default=0)
    if not any(after < each < opens for each in ends):
        after = max(after, opens)
    return min((each for each in ends if each > after), default=None)


def _place_of(table: SavedTable, jump: Jump) -> int | None:
    """How many rules of others stand before ours in the chain; None where ours is not there."""
    before, wanted = 0, jump.rule.canonical().render()
    for rule in table.rules_of(jump.chain):
        if owner_of_rule(rule.text) is None:
            before += 1
        elif (held := _parsed(rule.text)) and held.canonical().render() == wanted:
            return before
    return None


def _parsed(text: str) -> Rule | None:
    try:
        return parse(text)
    except ValueError:
        return None


def _others(table: SavedTable, chain: str) -> list[SavedRule]:
    return [rule for rule in table.rules_of(chain) if owner_of_rule(rule.text) is None]


def _standings(table: SavedTable, jump: Jump, judge: Judge) -> list[Standing]:
    key = (id(table), jump.chain, jump.rule, judge)
    if key not in _found:
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[key] = (table, list(_judged(table, jump.chain, _protocols(jump), judge, (jump.rule,))))
    return _found[key][1]


def _judged(
    table: SavedTable, chain: str, protocols: Sequence[str], judge: Judge, ours: tuple[Rule, ...]
) -> Iterator[Standing]:
    for place, saved in enumerate(_others(table, chain), 1):
        rule = _read(saved.text)
        met = judge.taken(table.name, chain, protocols, [*ours, rule]) if rule else None
        if rule is None or met is None:
            continue
        standings = []
        for kind, path in itertools.islice(_targets(table, [rule]), _MOST_TARGETS):
            if example := judge.taken(table.name, chain, protocols, [*ours, *path]):
                leaves = chain == "OUTPUT" and example.interface != judge.policy.loopback
                stays = leaves or _stays(path[-1], judge)
                standings.append(Standing(place, saved, kind, example, path[-1].target, stays, (tuple(path),)))
        if not standings and rule.target in table.chains and table.name == "nat":
            standings.append(Standing(place, saved, Kind.OPEN, met, rule.target))
        if standings:
            ways = tuple(way for each in standings if each.kind is Kind.ENDS for way in each.ways)
            yield replace(max(standings, key=lambda each: (each.kind is Kind.TRANSLATES, each.stays)), ways=ways)


def _targets(
    table: SavedTable, path: list[Rule], seen: frozenset[str] = frozenset()
) -> Iterator[tuple[Kind, list[Rule]]]:
    """Where the way that begins with a rule ends, each with the rules on it."""
    target, is_built_in = path[-1].target, len(path) == 1
    if target in _TRANSLATING:
        yield Kind.TRANSLATES, path
    elif target in _ENDING and (target != "RETURN" or is_built_in):
        yield Kind.ENDS, path
    elif target in table.chains and target not in seen and owner_of_chain(target) is None:
        for saved in table.rules_of(target):
            if rule := _read(saved.text):
                yield from _targets(table, [*path, rule], seen | {target})
        if path[-1].goto and is_built_in:  # what comes to the end of that chain does not come back
            yield Kind.ENDS, path


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Rule | None:
    """A rule of somebody else's; None where it has no target, or one of ours or kumactl's."""
    words = split(text)
    try:
        rule = parse(text)
    except ValueError:  # options that only others use: the target is what counts
        target = next((value for option, value in options_of(words) if option in ("-j", "-g")), None)
        if target is None:
            return None
        rule = Rule(target)
    if (("!", False), ("-p", False)) in itertools.pairwise(words):
        rule = replace(rule, protocol=None if rule.protocol not in ("tcp", "6") else "udp")
    return rule


def _stays(rule: Rule, judge: Judge) -> bool:
    """Whether what a rule translates still goes to this host."""
    for option in rule.target_options:
        if option.name in ("to-destination", "to") and option.values:
            host, _, _ = option.values[0].partition("-")
            host = host.partition("]")[0].removeprefix("[") if "[" in host else host
            host = host.partition(":")[0] if host.count(":") == 1 else host
            try:
                return judge.is_here(ip_address(host.partition("/")[0]))
            except ValueError:
                return True
    return True
