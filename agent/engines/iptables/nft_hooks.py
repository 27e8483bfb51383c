"""The nf_tables tables and base chains behind iptables-nft.

iptables-nft makes a table and its base chains when the first rule needs them and never removes them. To leave the host
as it was, install notes what existed, and uninstall removes what did not, as long as it is empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

TABLES = ("raw", "mangle", "nat")
FAMILIES = ("ip", "ip6")

BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})

Hook = tuple[str, str, str]
"""An nf_tables family, table and chain; the chain is "" for the table itself."""


def existing() -> frozenset[Hook] | None:
    """The tables iptables-nft would use and their chains, or None when libnftables is not there to tell."""
    listing = _command("list chains")
    tables = _command("list tables")
    if listing is None or tables is None:
        return None
    hooks = {
        (item["chain"]["family"], item["chain"]["table"], item["chain"]["name"]) for item in listing if "chain" in item
    }
    hooks |= {(item["table"]["family"], item["table"]["name"], "") for item in tables if "table" in item}
    return frozenset(hook for hook in hooks if hook[0] in FAMILIES and hook[1] in TABLES)


def remove_empty(keep: frozenset[Hook]) -> tuple[str, ...]:
    """Remove empty base chains, and then tables, that are not in `keep`; says what went.

    Deleting a chain that holds rules fails in the kernel (EBUSY), so a rule added meanwhile is never lost. A table is
    deleted only together with the last of its chains, in one transaction.
    """
    present = existing()
    if present is None:
        return ()
    removed = []
    for family in FAMILIES:
        for table in TABLES:
            removed += _remove_from(family, table, present, keep)
    return tuple(removed)


def _remove_from(family: str, table: str, present: frozenset[Hook], keep: frozenset[Hook]) -> list[str]:
    if (family, table, "") not in present:
        return []
    chains = {hook[2] for hook in present if hook[:2] == (family, table) and hook[2]}
    listing = _command(f"list table {family} {table}") or []
    if any("set" in item or "map" in item or "flowtable" in item for item in listing):
        return []
    filled = {item["rule"]["chain"] for item in listing if "rule" in item}
    bases = {item["chain"]["name"] for item in listing if item.get("chain", {}).get("policy") == "accept"}
    surplus = {chain for chain in (bases & BUILT_IN) - filled if (family, table, chain) not in keep}
    commands = [f"delete chain {family} {table} {chain}" for chain in sorted(surplus)]
    whole = surplus == chains and (family, table, "") not in keep
    if whole:
        commands.append(f"delete table {family} {table}")
    if not commands or _command("; ".join(commands)) is None:
        return []
    return [f"the empty table {family} {table}" if whole else f"empty chains of {family} {table}"]


def _command(text: str) -> list[dict[str, Any]] | None:
    """Run one nft(8) transaction; None when it failed or the library is missing."""
    try:
        import nftables
    except ImportError:
        return None
    library = nftables.Nftables()
    library.set_json_output(True)
    code, output, _ = library.cmd(text)
    if code != 0:
        return None
    found: list[dict[str, Any]] = json.loads(output)["nftables"] if output else []
    return found


def to_json(hooks: frozenset[Hook] | None) -> list[list[str]] | None:
    """For the state file."""
    return None if hooks is None else sorted(list(hook) for hook in hooks)


def from_json(items: Iterable[Iterable[str]] | None) -> frozenset[Hook]:
    """From the state file; without one, nothing is known to have existed."""
    return frozenset((family, table, chain) for family, table, chain in items or ())
