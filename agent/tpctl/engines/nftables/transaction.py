"""The text that replaces whatever our table holds by another, in one transaction. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpctl.engines.nftables.nft import Objects
from tpctl.engines.nftables.table import AND, Hook, Set, Table

_REFILLS = (1, 0)
"""The first version of nft that may be given a text that makes again what it deletes; see `_usable`."""


def preparation(current: Objects | None, wanted: Table) -> tuple[Set, ...]:
    """The sets that are made, in a transaction of their own, before the rules that look into them.

    The kernel shows the elements of a set of intervals a moment after it lets packets meet the rules of the same
    transaction (seen on Linux 6.18: under load, a connection to an included port leaked in one of a hundred swaps). A
    set that nothing refers to yet changes nothing.
    """
    if not _usable(current or []):
        return ()
    held = {item["set"]["name"] for item in current or [] if "set" in item}
    return tuple(item for item in wanted.sets if item.name not in held)


def surplus(before: Objects | None, now: Objects | None, where: str) -> str:
    """The text that takes away the sets of a table that were not there before; empty when there are none."""
    if now is None:
        return ""
    if before is None:
        return f"delete table {where}\n"
    there, then = ({item["set"]["name"]: None for item in listed if "set" in item} for listed in (now, before))
    return "".join(f"delete set {where} {name}\n" for name in there if name not in then)


def replacement(
    current: Objects | None, wanted: Table, *, comments: bool = True, prepared: tuple[Set, ...] = ()
) -> str:
    """The transaction that makes our table hold `wanted`, given what it holds now (None: there is no table).

    `prepared` are the sets that were made in it since. Sets of the same name and elements stay.

    Base chains are emptied and filled, not deleted and made again. The kernel runs a base chain as a whole either in
    its old or its new generation; but of two base chains a packet may meet the new one while it is still empty and the
    old one when it is already empty, and leak. Called chains are made again: only rules refer to them. A base chain
    that comes back is listed behind the others; that has no meaning, for no two have the same hook and priority.
    """
    held = current or []
    kept = frozenset(item.name for item in wanted.sets if item in prepared or (_usable(held) and _holds(held, item)))
    missing = wanted._replace(sets=tuple(item for item in wanted.sets if item.name not in kept))
    return "".join(f"{line}\n" for line in _clearing(held, wanted, kept)) + missing.render(comments=comments)


def _holds(current: Objects, wanted: Set) -> bool:
    """Whether the kernel holds this set with these elements: a stranger may have changed them."""
    for item in (item["set"] for item in current if "set" in item):
        if item["name"] == wanted.name:
            elements = [_element(element) for element in item.get("elem", ())]
            return _type(item.get("type")) == wanted.type and sorted(elements) == sorted(map(_bare, wanted.elements))
    return False


def _type(listed: Any) -> str:
    return AND.join(map(str, listed)) if isinstance(listed, list) else str(listed)


def _element(listed: Any) -> str:
    """An element of a listed set, as we write it."""
    if not isinstance(listed, dict):
        return str(listed)
    if "concat" in listed:
        return AND.join(map(_element, listed["concat"]))
    if "prefix" in listed:
        return f"{listed['prefix']['addr']}/{listed['prefix']['len']}"
    if "range" in listed:
        return "-".join(map(str, listed["range"]))
    return _element(listed["elem"]["val"]) if "elem" in listed else ""


def _bare(element: str) -> str:
    """A network of one address is listed as the address."""
    address, _, length = element.partition("/")
    return address if length == ("128" if ":" in address else "32") else element


def _clearing(current: Objects, wanted: Table, kept: frozenset[str]) -> Iterator[str]:
    if not _usable(current):
        yield f"delete table {wanted.where}"
        return
    hooks = {chain.name: chain.hook for chain in wanted.chains if chain.hook}
    chains = [item["chain"] for item in current if "chain" in item]
    yield from (f"flush chain {wanted.where} {chain['name']}" for chain in chains)
    for kind in ("map", "set"):
        for item in (item[kind] for item in current if kind in item and item[kind]["name"] not in kept):
            # A packet that began in the old generation of a chain and looks into an emptied set after the commit finds
            # nothing there, and an included port would leak; in a set that is deleted whole it still finds everything.
            if kind == "map":
                # Before Linux 6.4 deleting a map did not release the chains its elements jump to.
                yield f"flush map {wanted.where} {item['name']}"
            yield f"delete {kind} {wanted.where} {item['name']}"
    for chain in chains:
        if hook_of(chain) is None or hooks.get(chain["name"]) != hook_of(chain):
            yield f"delete chain {wanted.where} {chain['name']}"


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
