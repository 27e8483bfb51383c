"""The text that replaces whatever our table holds by another, in one transaction. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent.engines.nftables.nft import Objects
from agent.engines.nftables.table import TABLE, Hook, Table

_REFILLS = (1, 0)
"""The first version of nft that may be given a text that makes again what it deletes; see `_usable`."""


def replacement(current: Objects | None, wanted: Table, *, comments: bool = True) -> str:
    """The transaction that makes our table hold `wanted`, given what it holds now (None: there is no table).

    Base chains are emptied and filled, not deleted and made again. The kernel runs a base chain as a whole either in
    its old or its new generation; but of two base chains a packet may meet the new one while it is still empty and the
    old one when it is already empty, and leak. Sets and called chains are made again: only rules refer to them.
    """
    return "".join(f"{line}\n" for line in _clearing(current or [], wanted)) + wanted.render(comments=comments)


def _clearing(current: Objects, wanted: Table) -> Iterator[str]:
    if not _usable(current):
        yield f"delete table {TABLE}"
        return
    hooks = {chain.name: chain.hook for chain in wanted.chains if chain.hook}
    chains = [item["chain"] for item in current if "chain" in item]
    yield from (f"flush chain {TABLE} {chain['name']}" for chain in chains)
    for kind in ("map", "set"):
        for item in (item[kind] for item in current if kind in item):
            # A packet that began in the old generation of a chain and looks into an emptied set after the commit finds
            # nothing there, and an included port would leak; in a set that is deleted whole it still finds everything.
            if kind == "map":
                # Before Linux 6.4 deleting a map did not release the chains its elements jump to.
                yield f"flush map {TABLE} {item['name']}"
            yield f"delete {kind} {TABLE} {item['name']}"
    for chain in chains:
        if hook_of(chain) is None or hooks.get(chain["name"]) != hook_of(chain):
            yield f"delete chain {TABLE} {chain['name']}"


def _version(text: str) -> tuple[int, ...]:
    """A version as numbers; an unknown one counts as new."""
    parts = tuple(int(part) for part in text.split(".") if part.isdecimal())
    return parts or _REFILLS


def _usable(current: Objects) -> bool:
    """Whether the table can be filled again; one that was put to sleep, or holds what we never make, cannot.

    nft 0.9.8 (Debian 11) crashes, after the kernel has carried it out, on a text that deletes a chain or set and makes
    it again (run; 1.0.2, 1.0.6 and 1.1.3 do not). It gets the whole table deleted and made again, which is one
    transaction too.
    """
    for item in current:
        if _version(item.get("metainfo", {}).get("version", "")) < _REFILLS:
            return False
        if item.get("table", {}).get("flags"):
            return False
        if not item.keys() <= {"metainfo", "table", "chain", "rule", "set", "map"}:
            return False
    return True


def hook_of(chain: dict[str, Any]) -> Hook | None:
    """Where a listed chain is attached; None when it is not a base chain."""
    if "hook" not in chain:
        return None
    return Hook(chain["type"], chain["hook"], int(chain["prio"]))
