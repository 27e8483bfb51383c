"""The nf_tables tables and base chains behind iptables-nft.

iptables-nft makes a table and its base chains when the first rule needs them and never removes them. To leave the host
as it was, install notes what existed, and uninstall removes what did not, as long as it is empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tpctl.engines import presence
from tpctl.engines.nftables import listing
from tpctl.engines.nftables.nft import Nft, NftError, find
from tpctl.system.errors import HostError

TABLES = ("filter", "raw", "mangle", "nat")
FAMILIES = ("ip", "ip6")

BUILT_IN = presence.IPTABLES_CHAINS

Hook = tuple[str, str, str]
"""An nf_tables family, table and chain; the chain is "" for the table itself."""


def existing() -> frozenset[Hook] | None:
    """The tables iptables-nft would use and their chains, or None when there is no way to nf_tables to tell."""
    tables, chains = presence.tables(), presence.chains()
    if tables is None or chains is None:
        return _listed()
    hooks = {(family, table, "") for family, table in tables} | {each[:3] for each in chains}
    return _of_iptables(hooks)


def _listed() -> frozenset[Hook] | None:
    """The same by nft, which asks again until nobody has changed anything meanwhile."""
    way = _way()
    chains = way.listings(["list chains"])[0] if way else None
    if way is None or chains is None:
        return None
    hooks = {(table.family, table.name, chain.name) for table in listing.read(chains) for chain in table.chains}
    hooks |= {(family, table, "") for family, table, _ in hooks}
    # One without chains is nowhere else to be seen.
    unseen = [
        (*each, "")
        for each in itertools.product(FAMILIES, TABLES)
        if (*each, "") not in hooks and not presence.lacks(" ".join(each))
    ]
    answers = way.listings([f"list table {family} {table}" for family, table, _ in unseen]) if unseen else []
    return _of_iptables(hooks | {hook for hook, held in zip(unseen, answers, strict=True) if held is not None})


def _of_iptables(hooks: Iterable[Hook]) -> frozenset[Hook]:
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
    there = [each for each in itertools.product(FAMILIES, TABLES) if (*each, "") in present]
    listed = way.listings([f"list table {family} {table}" for family, table in there])
    going: dict[str, str] = {}
    for (family, table), text in zip(there, listed, strict=True):
        chains = {hook[2] for hook in present if hook[:2] == (family, table) and hook[2]}
        commands, said = _surplus(listing.read(text or ""), family, table, chains, keep)
        if commands:
            going["".join(f"{command}\n" for command in commands)] = said
    return tuple(_executed(way, going))


def _executed(way: Nft, going: Mapping[str, str]) -> Iterator[str]:
    """Carry texts out, each of which may be refused without the others; says what went."""
    try:
        if going:
            way.execute("".join(going))
    except NftError:
        for text, said in going.items() if len(going) > 1 else ():
            yield from _executed(way, {text: said})
    else:
        yield from going.values()


def _surplus(
    content: Sequence[listing.ListedTable], family: str, table: str, chains: set[str], keep: frozenset[Hook]
) -> tuple[list[str], str]:
    """What takes away what is empty of a table and not to be kept, and how to say it. Pure."""
    if any(held.others for held in content):
        return [], ""
    empty = {chain.name for held in content for chain in held.chains if chain.policy == "accept" and not chain.rules}
    surplus = {chain for chain in empty & BUILT_IN if (family, table, chain) not in keep}
    commands = [f"delete chain {family} {table} {chain}" for chain in sorted(surplus)]
    whole = surplus == chains and (family, table, "") not in keep
    if whole:
        commands.append(f"delete table {family} {table}")
    return commands, f"the empty table {family} {table}" if whole else f"empty chains of {family} {table}"


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
