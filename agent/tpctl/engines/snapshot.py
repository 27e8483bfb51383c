"""What tpctl or kumactl holds in either variant of iptables, as plain data, and the way back to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.engines.base import Footprint
from tpctl.engines.iptables import nft_hooks, tools
from tpctl.engines.iptables.engine import IptablesEngine, select
from tpctl.engines.iptables.parts import FamilyRules, Jump, TableRules
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.engines.iptables.rule import parse
from tpctl.engines.iptables.saved import SavedTable
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family
from tpctl.system.errors import ApplyError, HostError

Snapshot = dict[str, Any]
_ORDER = ("filter", "raw", "mangle", "nat")
"""Of tables, as in a plan of ours: a query must not be redirected before its zone is chosen."""


def take() -> Snapshot:
    """By variant, family and table: chains with their rules, and rules in others' chains. Empty when there is none."""
    found: Snapshot = {}
    engine = _engine()
    if engine is None:
        return found
    for variant in tools.VARIANTS:
        for family, tables in engine.tables(variant).items():
            for name, table in tables.items():
                if table.owners():
                    found.setdefault(variant, {}).setdefault(str(int(family)), {})[name] = _document(table)
    return found


def restore(snapshot: Mapping[str, Any], footprint: Footprint | None = None) -> None:
    """Put everything in the snapshot back into the kernel, in place of what tpctl has in iptables; all or nothing.

    Raises ApplyError or HostError when that cannot be done; the rules are then as they were before. Rules of another
    engine stay: they may go after this.
    """
    engine = _engine()
    if engine is None:
        raise HostError(f"there is no iptables on this host to put {described(snapshot)} back with")
    try:
        plans = {variant: _plan(held) for variant, held in snapshot.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise ApplyError(f"{described(snapshot)} cannot be read from the record: {error}") from error
    engine.exchange(plans)
    if footprint is not None:
        nft_hooks.remove_empty(nft_hooks.from_json(footprint.get("hooks")))


def end_empty_chains(footprint: Footprint) -> None:
    """Remove what iptables-nft has made since the footprint was taken, where it is empty and that is known."""
    if footprint.get("hooks") is not None:
        nft_hooks.remove_empty(nft_hooks.from_json(footprint["hooks"]))


def described(snapshot: Mapping[str, Any]) -> str:
    """Whose rules they are, in words."""
    return f"kumactl's rules ({' and '.join(snapshot)})"


def _engine() -> IptablesEngine | None:
    try:
        return select(EngineOptions())
    except HostError:
        return None


def _document(table: SavedTable) -> dict[str, Any]:
    return {
        "chains": [[chain, [rule.text for rule in table.rules_of(chain)]] for chain in table.owned_chains()],
        "jumps": [[rule.chain, rule.index, rule.text] for rule in table.owned_jumps()],
    }


def _plan(families: Mapping[str, Any]) -> IptablesPlan:
    """The rules of one variant, as if they were ours."""
    return IptablesPlan(
        tuple(
            FamilyRules(
                Family(int(family)),
                tuple(_rules(name, tables[name]) for name in sorted(tables, key=_ORDER.index)),
            )
            for family, tables in families.items()
        )
    )


def _rules(name: str, held: Mapping[str, Any]) -> TableRules:
    chains = tuple((chain, tuple(parse(text) for text in texts)) for chain, texts in held["chains"])
    return TableRules(name, chains, tuple(Jump(chain, parse(text), index) for chain, index, text in held["jumps"]))
