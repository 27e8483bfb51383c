"""Mutations of the iptables engine's plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from typing import Any

from tests.equivalence.mutant import Mutant, Spot, name_of, unseen
from tpctl.engines.iptables.parts import FamilyRules, Jump, TableRules
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.engines.iptables.rule import Criterion, Match, Option, Rule
from tpctl.rehearsal.cgroup import BELOW
from tpctl.spec.policy import MAX_PORT, Family, Policy

_CRITERIA = {"source": "source", "destination": "destination", "in_interface": "in", "out_interface": "out"}
_PARTS = {"uid-owner": "owner", "tcp-flags": "SYN", "dst-type": "local", "ctstate": "state", "path": "cgroup"}
_PARTS |= {"src-type": "local source", "mark": "connection mark", "ctdir": "direction"}
_PORTS = ("dport", "dports", "sport", "ctorigdstport")
_SWAPPED_TARGETS = {
    "TPCTL_INBOUND_REDIRECT": "TPCTL_OUTBOUND_REDIRECT",
    "TPCTL_OUTBOUND_REDIRECT": "TPCTL_INBOUND_REDIRECT",
}
_NUMBERED = (*_PORTS, "uid-owner")

Change = tuple[str, str, str, Rule | None]
"""Kind, part, what more there is to say, and the rule that takes the place of the right one."""


def mutants(plan: IptablesPlan, policy: Policy) -> Iterator[Mutant]:
    """Every mutation of a plan."""
    for number, rules in enumerate(plan.families):
        rest = plan.families[:number] + plan.families[number + 1 :]
        spot = Spot(f"IPv{rules.family}", "family", rules.family)
        yield Mutant("drop a family", spot, dataclasses.replace(plan, families=rest), "nothing")
        for place, table in enumerate(rules.tables):
            for kind, spot, became, broken in _of_table(rules.family, table):
                tables = (*rules.tables[:place], broken, *rules.tables[place + 1 :])
                families = (*plan.families[:number], FamilyRules(rules.family, tables), *plan.families[number + 1 :])
                wrong = dataclasses.replace(plan, families=families)
                yield Mutant(kind, spot, wrong, became, unseen(policy, kind, spot))


def _of_table(family: Family, table: TableRules) -> Iterator[tuple[str, Spot, str, TableRules]]:
    for place, (chain, rules) in enumerate(table.chains):
        for kind, spot, became, broken in _of_chain(family, chain, rules):
            chains = (*table.chains[:place], (chain, broken), *table.chains[place + 1 :])
            yield kind, spot, became, dataclasses.replace(table, chains=chains)
    for place, jump in enumerate(table.jumps):
        for kind, part, more, rule in _changes(jump.rule):
            spot = _spot(family, jump.chain, jump.rule, part, more)
            between = () if rule is None else (dataclasses.replace(jump, rule=rule),)
            jumps = table.jumps[:place] + between + table.jumps[place + 1 :]
            if rule is None:  # the places of the others are counted without it
                jumps = tuple(_moved_up(each, jump) for each in jumps)
            yield (
                kind,
                spot,
                rule.render(comments=False) if rule else "nothing",
                dataclasses.replace(table, jumps=jumps),
            )


def _moved_up(jump: Jump, gone: Jump) -> Jump:
    if jump.chain != gone.chain or jump.position is None or gone.position is None or jump.position < gone.position:
        return jump
    return dataclasses.replace(jump, position=jump.position - 1)


def _of_chain(family: Family, chain: str, rules: tuple[Rule, ...]) -> Iterator[tuple[str, Spot, str, tuple[Rule, ...]]]:
    for place, rule in enumerate(rules):
        for kind, part, more, broken in _changes(rule):
            between = () if broken is None else (broken,)
            became = broken.render(comments=False) if broken else "nothing"
            yield kind, _spot(family, chain, rule, part, more), became, rules[:place] + between + rules[place + 1 :]
    for place, (first, second) in enumerate(itertools.pairwise(rules)):
        if _commute(first, second):
            continue
        spot = _spot(family, chain, first, "rule", name_of(second.comment or ""))
        swapped = (*rules[:place], second, first, *rules[place + 2 :])
        yield "swap two rules", spot, f"after {second.render(comments=False)}", swapped


def _commute(first: Rule, second: Rule) -> bool:
    """Whether the order makes no difference: they do the same, or no packet matches both."""
    if (first.target, first.target_options) == (second.target, second.target_options):
        return True
    if first.protocol and second.protocol and first.protocol != second.protocol:
        return True
    if _are_apart(first.source, second.source) or _are_apart(first.destination, second.destination):
        return True
    owners = [option for rule in (first, second) for match in rule.matches for option in match.options]
    owners = [option for option in owners if option.name == "uid-owner"]
    if len(owners) == 2 and owners[0].values == owners[1].values and owners[0].negated != owners[1].negated:
        return True
    interfaces = first.in_interface, second.in_interface
    return all(interfaces) and interfaces[0] != interfaces[1]


def _are_apart(first: Criterion | None, second: Criterion | None) -> bool:
    """Whether no address is in both."""
    if not first or not second or first.negated or second.negated:
        return False
    return not ip_network(first.value).overlaps(ip_network(second.value))


def _spot(family: Family, chain: str, rule: Rule, part: str, more: str) -> Spot:
    return Spot(name_of(rule.comment or ""), part, family, chain, rule.render(comments=False), more)


def _changes(rule: Rule) -> Iterator[Change]:
    yield "drop a rule", "rule", "", None
    yield from _criteria(rule)
    for place, match in enumerate(rule.matches):
        for kind, part, broken in _match(match):
            between = () if broken is None else (broken,)
            yield (
                kind,
                part,
                "",
                dataclasses.replace(rule, matches=rule.matches[:place] + between + rule.matches[place + 1 :]),
            )
    for option in rule.target_options:
        if option.name == "zone":
            yield "wrong zone", "zone", "", _with(rule, Option("zone", (str(3 - int(option.values[0])),)))
        if option.name in ("to-ports", "on-port", "to-destination"):
            colon = ":" * option.values[0].startswith(":")
            for values in _numbers(option.values[0].removeprefix(":")):
                yield "wrong port", "listener", "", _with(rule, Option(option.name, (f"{colon}{values}",)))
        if option.name == "set-xmark":
            yield "wrong mark", "mark", "", _with(rule, Option("set-xmark", ("0x4000/0x4000",)))
    if rule.target in _SWAPPED_TARGETS:
        yield "wrong listener", "listener", "", dataclasses.replace(rule, target=_SWAPPED_TARGETS[rule.target])


def _with(rule: Rule, option: Option) -> Rule:
    others = tuple(each for each in rule.target_options if each.name != option.name)
    return dataclasses.replace(rule, target_options=(*others, option))


def _criteria(rule: Rule) -> Iterator[Change]:
    for field, part in _CRITERIA.items():
        criterion: Criterion | None = getattr(rule, field)
        if criterion is None:
            continue
        yield "drop a condition", part, "", _field(rule, field, None)
        negated = dataclasses.replace(criterion, negated=not criterion.negated)
        yield "negate", part, "", _field(rule, field, negated)
        if part in ("in", "out"):
            wrong = dataclasses.replace(criterion, value="other9")
            yield "wrong interface", "interface", "", _field(rule, field, wrong)
            continue
        for more, value in off_by_one(criterion.value):
            wrong = dataclasses.replace(criterion, value=value)
            yield "off by one", part, more, _field(rule, field, wrong)


def _field(rule: Rule, name: str, criterion: Criterion | None) -> Rule:
    changed: dict[str, Any] = {name: criterion}
    return dataclasses.replace(rule, **changed)


def off_by_one(network: str) -> Iterator[tuple[str, str]]:
    """A network with a prefix one longer and one shorter; the host next to a host."""
    whole = ip_network(network)
    if whole.prefixlen == whole.max_prefixlen:
        yield "beside", str(ip_network(whole.network_address + 1))
        return
    yield "narrower", str(next(whole.subnets()))
    if whole.prefixlen:
        yield "wider", str(whole.supernet())


def _match(match: Match) -> Iterator[tuple[str, str, Match | None]]:
    for place, option in enumerate(match.options):
        part = "port" if option.name in _PORTS else _PARTS[option.name]
        rest = match.options[:place] + match.options[place + 1 :]
        if option.name not in _PORTS or rest:
            yield "drop a condition", part, dataclasses.replace(match, options=rest) if rest else None
        if option.name in ("uid-owner", "dst-type", "src-type", "path"):
            yield "negate", part, _replaced(match, place, dataclasses.replace(option, negated=not option.negated))
        if option.name == "path":
            for path in other_groups(option.values[0]):
                yield "wrong cgroup", part, _replaced(match, place, dataclasses.replace(option, values=(path,)))
        if match.name == "mark":
            bits, slash, mask = option.values[0].partition("/")
            wrong = f"{int(bits, 16) ^ 0x40000:#x}{slash}{mask}"
            yield "wrong mark", "mark", _replaced(match, place, dataclasses.replace(option, values=(wrong,)))
        if option.name in _NUMBERED:
            for values in _numbers(option.values[0]):
                yield "off by one", part, _replaced(match, place, dataclasses.replace(option, values=(values,)))


def other_groups(path: str) -> tuple[str, str]:
    """The group above, and one below: both are there in a rehearsal."""
    return path.rpartition("/")[0], f"{path}/{BELOW}"


def _replaced(match: Match, place: int, option: Option) -> Match:
    return dataclasses.replace(match, options=(*match.options[:place], option, *match.options[place + 1 :]))


def _numbers(text: str) -> Iterator[str]:
    """Each number of a list of ranges one less or one more, so that the ranges get wider and narrower."""
    items = text.split(",")
    for place, item in enumerate(items):
        for wrong in shifted(item):
            yield ",".join((*items[:place], wrong, *items[place + 1 :]))


def shifted(item: str) -> Iterable[str]:
    """A number or range with one end off by one; nothing where the range would end up empty."""
    mark = ":" if ":" in item else "-"
    first, _, last = item.partition(mark)
    if not last:
        return [str(int(first) + 1)] if int(first) not in (MAX_PORT, 2**32 - 2) else [str(int(first) - 1)]
    low, high = int(first), int(last)
    found = [(low + 1, high), (low, high - 1), (low - 1, high), (low, high + 1)]
    return [f"{a}{mark}{b}" for a, b in found if 0 < a <= b and b not in (MAX_PORT + 1, 2**32 - 1)]
