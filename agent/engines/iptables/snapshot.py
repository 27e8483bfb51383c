"""What tpctl or kumactl holds in either variant of iptables, as plain data, and the way back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agent.engine_options import EngineOptions
from agent.engines.iptables import tools
from agent.engines.iptables.backend import Backend, RestoreBackend
from agent.engines.iptables.change import change
from agent.engines.iptables.legacy import LegacyBackend
from agent.engines.iptables.parts import Jump, TableRules
from agent.engines.iptables.rule import parse
from agent.engines.iptables.saved import SavedTable
from agent.policy import Family

Snapshot = dict[str, Any]


def take() -> Snapshot:
    """By variant, family and table: chains with their rules, and rules in others' chains. Empty when there is none."""
    found: Snapshot = {}
    for variant, family, backend in _backends():
        for name, table in backend.save().items():
            if table.owners():
                found.setdefault(variant, {}).setdefault(str(int(family)), {})[name] = _document(table)
    return found


def restore(snapshot: Mapping[str, Any]) -> None:
    """Put everything in the snapshot back into the kernel. Raises ApplyError when the kernel refuses."""
    for variant, family, backend in _backends():
        wanted: Mapping[str, Any] = snapshot.get(variant, {}).get(str(int(family)), {})
        if not wanted:
            continue
        current = backend.save()
        changes = [change(current.get(name, SavedTable(name)), _rules(name, held)) for name, held in wanted.items()]
        backend.commit(tuple(changes), comments=True)


def _backends() -> Iterator[tuple[str, Family, Backend]]:
    for variant in tools.VARIANTS:
        for family in Family:
            if variant == "legacy" and not tools.legacy_tables_exist(family):
                continue
            if found := tools.find(variant, family):
                kind = RestoreBackend if variant == "nft" else LegacyBackend
                yield variant, family, kind(found, EngineOptions())


def _document(table: SavedTable) -> dict[str, Any]:
    return {
        "chains": [[chain, [rule.text for rule in table.rules_of(chain)]] for chain in table.owned_chains()],
        "jumps": [[rule.chain, rule.index, rule.text] for rule in table.owned_jumps()],
    }


def _rules(name: str, held: Mapping[str, Any]) -> TableRules:
    chains = tuple((chain, tuple(parse(text) for text in texts)) for chain, texts in held["chains"])
    return TableRules(name, chains, tuple(Jump(chain, parse(text), index) for chain, index, text in held["jumps"]))
