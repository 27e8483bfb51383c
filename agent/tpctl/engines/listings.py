"""What the programs of iptables list in this network namespace, and whether any of it is somebody else's."""

from __future__ import annotations

from collections.abc import Mapping

from tpctl.engines import presence
from tpctl.engines.iptables import saved, tools
from tpctl.engines.iptables.backend import read_tables
from tpctl.spec.policy import Family
from tpctl.system.errors import ApplyError, HostError


class Listings:
    """The listings of one command; each program is called once, when its listing is asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, Family], Mapping[str, saved.SavedTable]] = {}

    def know(self, listed: Mapping[str, Mapping[Family, Mapping[str, saved.SavedTable]]]) -> None:
        """Take over what an engine has just listed, by variant and family (`Inspection.listed`)."""
        for variant, families in listed.items():
            self._held.update(((variant, family), tables) for family, tables in families.items())

    def of(self, variant: str, family: Family) -> Mapping[str, saved.SavedTable]:
        """The tables of a variant by their names; none where they cannot be read."""
        key = (variant, family)
        if key not in self._held:
            program = tools.find(variant, family)
            try:
                self._held[key] = read_tables(program) if program else {}
            except (ApplyError, HostError):
                self._held[key] = {}
        return self._held[key]

    def are_ours(self, variant: str | None) -> bool:
        """Whether netfilter certainly holds nothing but tpctl's: tables of its own, and rules in a variant of iptables.

        Then there is nothing that those would have to look at who know the rules of others.
        """
        native = presence.iptables_tables()
        if native is None:
            return False
        for family in Family:
            listed = self.of("nft", family)
            if {name for kind, name in native if kind == presence.IPTABLES_FAMILIES[family]} - set(listed):
                return False
            legacy = self.of("legacy", family)
            if presence.legacy_tables_exist(family) and not legacy:
                return False
            if not (_are_blank(listed, ours=variant == "nft") and _are_blank(legacy, ours=variant == "legacy")):
                return False
        return True


def _are_blank(tables: Mapping[str, saved.SavedTable], *, ours: bool) -> bool:
    """Whether they hold nothing, or nothing but what is `ours`."""
    return all((without_ours(table) if ours else table).is_blank for table in tables.values())


def without_ours(table: saved.SavedTable) -> saved.SavedTable:
    """A table without what is tpctl's. Pure."""
    rules = tuple(
        rule
        for rule in table.rules
        if saved.owner_of_chain(rule.chain) != presence.OURS and saved.owner_of_rule(rule.text) != presence.OURS
    )
    chains = {name: policy for name, policy in table.chains.items() if saved.owner_of_chain(name) != presence.OURS}
    return saved.SavedTable(table.name, chains, rules, table.policies)
