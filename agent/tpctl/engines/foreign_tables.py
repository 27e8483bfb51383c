"""What other software holds in netfilter in this network namespace. Reads only, and loads nothing into the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tpctl.engines import foreign_iptables, foreign_nft, presence
from tpctl.engines.foreign import Place, Table
from tpctl.engines.iptables import saved, tools
from tpctl.engines.listings import Listings, without_ours
from tpctl.engines.nftables import nft
from tpctl.engines.presence import is_ours
from tpctl.spec.policy import Family
from tpctl.system.errors import ApplyError, HostError

_READING_SECONDS = 2.0
"""nft reads anew whenever anybody has changed anything meanwhile: beside a busy owner of thousands of rules it may
never end, and what stands there is then left unsaid."""
_FAMILIES = frozenset({"ip", "ip6", "inet"})


def foreign_tables(listings: Listings | None = None) -> tuple[Table, ...]:
    """Every table of both kinds, without the rules of tpctl. What cannot be read is left out."""
    listings = listings or Listings()
    likely = presence.iptables_tables()
    if likely is not None:
        translated = tuple(_of_variant(listings, "nft", _names(likely)))
        if likely <= {(table.family, table.name) for table in translated}:  # nft would list the same once more
            return (*translated, *_of_variant(listings, "legacy", None))
    native = tuple(_native())
    translated = tuple(_of_variant(listings, "nft", _iptables_like(native)))
    shown = {(table.family, table.name) for table in translated}
    own = [table for table in native if (table.family, table.name) not in shown]
    return (*own, *translated, *_of_variant(listings, "legacy", None))


def has_kumactl(tables: Iterable[Table]) -> bool:
    """Whether kumactl's chains are among them."""
    return any(saved.owner_of_chain(name) == "kumactl" for table in tables for name in table.chains)


def legacy_tables() -> tuple[Table, ...]:
    """Those of iptables' legacy variant alone, which count what their rules match."""
    return tuple(_of_variant(Listings(), "legacy", None))


def place_of(family: str, table: str, chain: str, handle: int) -> Place | None:
    """A rule of nf_tables by the kernel's number for it, or the policy of a chain (0), as its own program lists it."""
    try:
        listed = nft.find().numbered(f"list table {family} {table}", seconds=_READING_SECONDS)
    except (nft.NftError, HostError, ApplyError):
        return None
    native = next(foreign_nft.tables_of(listed), None)
    if native is None or chain not in native.chains:
        return None
    numbers = list(dict.fromkeys(rule.handle for rule in native.chains[chain].rules))
    if handle and handle not in numbers:
        return None
    for likely in _of_variant(Listings(), "nft", _iptables_like((native,)), whole=True):
        if likely.name == table and chain in likely.chains:
            held = likely.chains[chain]
            if len(held.rules) == len(numbers):
                return Place(likely, held, held.rules[numbers.index(handle)] if handle else None)
    rule = next((one for one in native.chains[chain].rules if one.handle == handle), None)
    return Place(native, native.chains[chain], rule if handle else None)


def _native() -> Iterator[Table]:
    try:
        text = nft.find().listing("list ruleset", seconds=_READING_SECONDS)
    except (nft.NftError, HostError, ApplyError):
        return
    for table in foreign_nft.tables_of(text):
        if table.family in _FAMILIES and not is_ours(table.family, table.name):
            yield table


def _iptables_like(native: tuple[Table, ...]) -> dict[str, set[str]]:
    """By family, the tables that iptables-nft can list: all their base chains are named as its own."""
    bases = (({chain.name for chain in table.chains.values() if chain.hook}, table) for table in native)
    return _names((table.family, table.name) for names, table in bases if names <= presence.IPTABLES_CHAINS)


def _names(tables: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """By family, the names of those tables that are of one of iptables' families."""
    found: dict[str, set[str]] = {"ip": set(), "ip6": set()}
    for family, name in tables:
        if family in found:
            found[family].add(name)
    return found


def _of_variant(
    listings: Listings, variant: str, wanted: Mapping[str, set[str]] | None, *, whole: bool = False
) -> Iterator[Table]:
    for family in Family:
        nft_family = "ip" if family is Family.IPV4 else "ip6"
        if wanted is not None and not wanted[nft_family]:
            continue
        held = listings.of(variant, family)
        tables = {name: table if whole else without_ours(table) for name, table in held.items()}
        for table in foreign_iptables.tables_of(f"{tools.command(family)}-{variant}", tables):
            if wanted is None or table.name in wanted[nft_family]:
                yield table
