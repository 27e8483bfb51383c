"""What listings of tables tell of tpctl's and kumactl's rules: whose they are, what they count, their drift. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

from tpctl.engines.base import RuleCounter
from tpctl.engines.iptables import saved
from tpctl.engines.iptables.change import holdings
from tpctl.engines.iptables.parts import TableRules
from tpctl.spec.policy import Family

Tables = Mapping[str, saved.SavedTable]
"""Of one family, by name."""


def owners(families: Iterable[Tables]) -> frozenset[str]:
    """Who of "tpctl" and "kumactl" has anything there."""
    return frozenset(owner for tables in families for table in tables.values() for owner in table.owners())


def families_of(owner: str, held: Mapping[Family, Tables]) -> Iterator[int]:
    """The IP families in which somebody has anything."""
    return (int(family) for family, tables in held.items() if owner in owners([tables]))


def redirected_ports(families: Iterable[Tables]) -> Iterator[int]:
    """Where rules of tpctl or kumactl redirect to."""
    for tables in families:
        for table in tables.values():
            yield from table.redirected_ports()


def installations(variant: str, families: Iterable[Tables]) -> tuple[str, ...]:
    """Whose installations those of a variant are, in words."""
    return tuple(f"{owner}'s rules ({variant})" for owner in sorted(owners(families)))


def unmarked_kuma_rules(families: Iterable[Tables]) -> Iterator[str]:
    """kumactl --disable-comments leaves rules in the built-in chains that nothing tells from other software's."""
    for tables in families:
        if "kumactl" not in owners([tables]):
            continue
        rules = [rule for table in tables.values() for rule in table.rules]
        if not any(saved.owner_of_chain(rule.chain) and saved.comment_of(rule.text) for rule in rules):
            yield from (
                "kumactl was installed without comments, so this rule may be its own; it was left: "
                f"-A {rule.chain} {rule.text}"
                for rule in rules
                if rule.chain in ("PREROUTING", "OUTPUT") and saved.looks_like_kumactl(rule.text)
            )


def holds_foreign(tables: Tables) -> bool:
    """Whether there are rules of anybody else."""
    return any(
        saved.owner_of_chain(rule.chain) is None and saved.owner_of_rule(rule.text) is None
        for table in tables.values()
        for rule in table.rules
    )


def listing(variant: str, family: Family, tables: Tables) -> Iterator[str]:
    """Every rule and chain of tpctl or kumactl, a line each."""
    for table in tables.values():
        for rule in table.owned_jumps():
            yield f"IPv{family} {variant} {table.name}: -A {rule.chain} {rule.text}"
        for chain in table.owned_chains():
            yield f"IPv{family} {variant} {table.name}: chain {chain} ({len(list(table.rules_of(chain)))} rules)"


def drift(family: Family, tables: Tables, wanted: Mapping[str, TableRules]) -> Iterator[str]:
    """A unified diff from what should be there of ours to what is."""
    for name in dict.fromkeys([*wanted, *tables]):
        current = tables.get(name, saved.SavedTable(name))
        expected = _canonical(wanted.get(name, TableRules(name)))
        try:
            actual = _canonical(holdings(current))
        except ValueError as error:
            yield f"IPv{family} {name}: a rule cannot be read: {error}"
            continue
        where = f"IPv{family} {name}"
        yield from difflib.unified_diff(expected, actual, f"plan {where}", f"kernel {where}", n=0, lineterm="")


def _canonical(rules: TableRules) -> list[str]:
    lines = []
    for chain, content in sorted(rules.chains):
        lines.append(f":{chain}")
        lines += [f"-A {chain} {rule.canonical().render()}" for rule in content]
    # firewalld's iptables backend keeps the direct rules of a built-in chain in a chain of its own, with this suffix.
    jumps = [(jump.chain.removesuffix("_direct"), jump.rule.canonical().render()) for jump in rules.jumps]
    return lines + [f"-A {chain} {text}" for chain, text in sorted(jumps, key=lambda jump: jump[0])]


def counters(tables: Mapping[Family, Tables]) -> Iterator[RuleCounter]:
    """How often each of their rules matched."""
    for family, held in tables.items():
        for table in held.values():
            for rule in table.rules:
                if saved.owner_of_chain(rule.chain) or saved.owner_of_rule(rule.text):
                    text = saved.comment_of(rule.text) or rule.text
                    yield RuleCounter(int(family), table.name, rule.chain, text, rule.packets, rule.bytes)
