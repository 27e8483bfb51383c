"""From what a table holds to what it should hold: one list of operations, applied in one commit.

Install, replace, uninstall and rollback are this one mechanism with different ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tpctl.engines.iptables.parts import Jump, TableRules
from tpctl.engines.iptables.rule import Rule, parse
from tpctl.engines.iptables.saved import SavedTable


@dataclass(frozen=True, slots=True)
class Declare:
    """Make the chain, or empty it when it exists."""

    chain: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Take one rule out of a chain."""

    chain: str
    index: int
    """Its place before any operation of this change; deletions of a chain come last place first."""
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """Put a rule into a chain."""

    chain: str
    rule: Rule
    position: int | None = None
    """None appends."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Remove every rule of a chain that is about to go."""

    chain: str


@dataclass(frozen=True, slots=True)
class DeleteChain:
    """Remove an empty chain that nothing jumps to."""

    chain: str


Operation = Declare | Delete | Place | Empty | DeleteChain


@dataclass(frozen=True, slots=True)
class TableChange:
    """Everything that happens to one table, in order, in one commit."""

    table: str
    operations: tuple[Operation, ...]


def change(current: SavedTable, wanted: TableRules) -> TableChange:
    """The operations that replace whatever tpctl or kumactl has in a table by `wanted`."""
    return TableChange(current.name, tuple(_operations(current, wanted)))


def _operations(current: SavedTable, wanted: TableRules) -> Iterator[Operation]:
    names = [name for name, _ in wanted.chains]
    outdated = [chain for chain in current.owned_chains() if chain not in names]
    yield from (Declare(name) for name in names)
    yield from (Delete(rule.chain, rule.index, rule.text) for rule in reversed(current.owned_jumps()))
    yield from (Empty(chain) for chain in outdated)
    yield from (DeleteChain(chain) for chain in outdated)
    for name, rules in wanted.chains:
        yield from (Place(name, rule) for rule in rules)
    lengths = Counter(rule.chain for rule in current.rules)
    lengths.subtract(rule.chain for rule in current.owned_jumps())
    for jump in wanted.jumps:
        # Others may have removed rules since a place was noted, and no chain takes a rule behind a place it lacks.
        is_end = jump.position is None or jump.position > lengths[jump.chain] + 1
        yield Place(jump.chain, jump.rule, None if is_end else jump.position)
        lengths[jump.chain] += 1


def flushing(current: SavedTable) -> Iterator[Operation]:
    """The operations that leave a table with empty built-in chains only. Chain policies stay."""
    yield from (Empty(chain) for chain in current.chains)
    yield from (DeleteChain(chain) for chain, policy in current.chains.items() if policy == "-")


def holdings(current: SavedTable) -> TableRules:
    """What tpctl or kumactl has in a table, in the form `change` takes: the way back to it.

    Raises ValueError when a rule cannot be read, which none that tpctl or kumactl writes is.
    """
    chains = tuple(
        (chain, tuple(parse(rule.text) for rule in current.rules_of(chain))) for chain in current.owned_chains()
    )
    jumps = tuple(Jump(rule.chain, parse(rule.text), rule.index) for rule in current.owned_jumps())
    return TableRules(current.name, chains, jumps)


Policies = Mapping[str, Mapping[str, str]]
"""By table and built-in chain: what stands behind its name in a listing."""


def restore_text(
    changes: tuple[TableChange, ...], *, comments: bool = True, numbered: bool = False, policies: Policies | None = None
) -> str:
    """The changes as iptables-restore(8) reads them with --noflush; a `#` line over each rule says what it is for.

    With `numbered`, rules are deleted by their place, which takes that nobody else changes the table meanwhile.
    `policies` are set, with their counters where iptables-restore is given --counters.
    """
    lines: list[str] = []
    for table in changes:
        lines.append(f"*{table.table}")
        lines += (f":{chain} {policy}" for chain, policy in (policies or {}).get(table.table, {}).items())
        for operation in table.operations:
            lines += _lines(operation, comments, numbered)
        lines.append("COMMIT")
    return "\n".join(lines) + "\n" if lines else ""


def _lines(operation: Operation, comments: bool, numbered: bool) -> Iterator[str]:
    match operation:
        case Declare(chain):
            yield f":{chain} - [0:0]"
        case Delete(chain, index, text):
            line_can_hold_it = "\n" not in text
            yield f"-D {chain} {text if line_can_hold_it and not numbered else index}"
        case Empty(chain):
            yield f"-F {chain}"
        case DeleteChain(chain):
            yield f"-X {chain}"
        case Place(chain, rule, position):
            if rule.comment:
                yield f"# {' '.join(rule.comment.split())}"
            where = f"-A {chain}" if position is None else f"-I {chain} {position}"
            yield f"{where} {rule.render(comments=comments)}"
