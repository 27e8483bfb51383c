"""The nf_tables tables and base chains behind iptables-nft.

iptables-nft makes a table and its base chains when the first rule needs them and never removes them. To leave the host
as it was, install notes what existed, and uninstall removes what did not, as long as it is empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from agent.engines.nftables.nft import Nft, NftError, find
from agent.errors import HostError

TABLES = ("raw", "mangle", "nat")
FAMILIES = ("ip", "ip6")

BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})

Hook = tuple[str, str, str]
"""An nf_tables family, table and chain; the chain is "" for the table itself."""


def existing() -> frozenset[Hook] | None:
    """The tables iptables-nft would use and their chains, or None when there is no way to nf_tables to tell."""
    way = _way()
    listing = way.found(["list chains"])[0] if way else None
    if way is None or listing is None:
        return None
    hooks = {
        (item["chain"]["family"], item["chain"]["table"], item["chain"]["name"]) for item in listing if "chain" in item
    }
    hooks |= {(family, table, "") for family, table, _ in hooks}
    # One without chains is nowhere else to be seen.
    unseen = [(*each, "") for each in itertools.product(FAMILIES, TABLES) if (*each, "") not in hooks]
    answers = way.found([f"list table {family} {table}" for family, table, _ in unseen]) if unseen else []
    hooks |= {hook for hook, held in zip(unseen, answers, strict=True) if held is not None}
    return frozenset(hook for hook in hooks if hook[0] in FAMILIES and hook[1] in TABLES)


def remove_empty(keep: frozenset[Hook]) -> tuple[str, ...]:
    """Remove empty base chains, and then tables, that are not in `keep`; says what went.

    Deleting a chain that holds rules fails in the kernel (EBUSY), so a rule added meanwhile is never lost. A table is
    deleted only together with the last of its chains, in one transaction.
    """
    way = _way()
    present = existing()
    if way is None or present is None:
        return ()
    removed = []
    for family, table in itertools.product(FAMILIES, TABLES):
        if (family, table, "") in present:
            chains = {hook[2] for hook in present if hook[:2] == (family, table) and hook[2]}
            removed += _remove_from(way, family, table, chains, keep)
    return tuple(removed)


def _remove_from(way: Nft, family: str, table: str, chains: set[str], keep: frozenset[Hook]) -> list[str]:
    listing = way.found([f"list table {family} {table}"])[0] or []
    if any("set" in item or "map" in item or "flowtable" in item for item in listing):
        return []
    filled = {item["rule"]["chain"] for item in listing if "rule" in item}
    bases = {item["chain"]["name"] for item in listing if item.get("chain", {}).get("policy") == "accept"}
    surplus = {chain for chain in (bases & BUILT_IN) - filled if (family, table, chain) not in keep}
    commands = [f"delete chain {family} {table} {chain}" for chain in sorted(surplus)]
    whole = surplus == chains and (family, table, "") not in keep
    if whole:
        commands.append(f"delete table {family} {table}")
    if not commands:
        return []
    try:
        way.execute("".join(f"{command}\n" for command in commands))
    except NftError:
        return []
    return [f"the empty table {family} {table}" if whole else f"empty chains of {family} {table}"]


def _way() -> Nft | None:
    try:
        return find()
    except HostError:
        return None


def to_json(hooks: frozenset[Hook] | None) -> list[list[str]] | None:
    """For the state file."""
    return None if hooks is None else sorted(list(hook) for hook in hooks)


def from_json(items: Iterable[Iterable[str]] | None) -> frozenset[Hook]:
    """From the state file; without one, or with a damaged one, nothing is known to have existed."""
    try:
        return frozenset((family, table, chain) for family, table, chain in items or ())
    except (TypeError, ValueError):
        return frozenset()
