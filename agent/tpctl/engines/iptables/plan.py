"""What the iptables engine is to bring about: the rules of every family of a policy, and their places."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from tpctl.engines.iptables import order, saved, tproxy
from tpctl.engines.iptables.change import TableChange, change, restore_text
from tpctl.engines.iptables.listed import Tables
from tpctl.engines.iptables.meets import Judge
from tpctl.engines.iptables.parts import FamilyRules, TableRules
from tpctl.engines.iptables.ruleset import rules_for, without_nat
from tpctl.host import routes
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Cgroup, Family, Policy

Told = Callable[[saved.SavedTable, TableRules, Judge], Iterator[str]]


@dataclass(frozen=True, slots=True)
class IptablesPlan:
    """The rules of every family of a policy."""

    families: tuple[FamilyRules, ...]
    comments: bool = True
    cgroup: Cgroup | None = None
    """The control group that rules name by its path; the kernel looks it up when they are made."""
    policy: Policy | None = None
    """By which the places of jumps among the rules of others are found; without one they are as given."""

    @classmethod
    def of_policy(cls, policy: Policy, options: EngineOptions) -> IptablesPlan:
        """The plan for a policy."""
        families = tuple(rules_for(policy, family) for family in sorted(policy.families))
        return cls(families, options.comments, policy.cgroup, policy)

    def without_nat(self, families: Collection[Family]) -> IptablesPlan:
        """The same plan for a host on which some families have no more of NAT than REDIRECT."""
        changed = (without_nat(rules) if rules.family in families else rules for rules in self.families)
        return replace(self, families=tuple(changed))

    def render(self) -> str:
        """The restore text of each family, for a host on which nothing of ours is installed."""
        return self.render_over({})

    def render_over(self, current: Mapping[Family, Tables]) -> str:
        """The restore text of each family that replaces what `current` holds of ours."""
        families = sorted({rules.family for rules in self.families} | set(current))
        texts = {family: self.changes(family, current.get(family, {})) for family in families}
        return "\n".join(
            f"### IPv{family} ###\n{restore_text(changes, comments=self.comments)}"
            for family, changes in texts.items()
            if changes
        )

    def of(self, family: Family) -> Mapping[str, TableRules]:
        """A family's tables by name, in the order in which they are applied."""
        return {table.table: table for rules in self.families if rules.family is family for table in rules.tables}

    def changes(self, family: Family, current: Tables) -> tuple[TableChange, ...]:
        """What makes tables hold the plan's rules of a family in place of whatever they hold of ours or kumactl's."""
        return changes_to(current, self.beside(family, current))

    def beside(self, family: Family, current: Tables) -> Mapping[str, TableRules]:
        """A family's tables, with the places of jumps among the rules of others in `current`."""
        wanted = self.of(family)
        judge = self.judge(family) if current and wanted else None
        if judge is None:
            return wanted
        empty = {name: saved.SavedTable(name) for name in wanted}
        return {name: order.placed({**empty, **current}[name], rules, judge) for name, rules in wanted.items()}

    def judge(self, family: Family) -> Judge | None:
        """What tells which rules of others on this host matter to the plan's jumps."""
        return Judge(self.policy, family, routes.local_networks(family)) if self.policy else None

    def told_of_places(self, held: Mapping[Family, Tables], told: Told) -> Iterator[str]:
        """What is to be told of the places of the plan's jumps among what tables hold."""
        for family, tables in held.items():
            wanted = self.of(family)
            judge = self.judge(family) if wanted else None
            for name, rules in wanted.items() if judge else ():
                if name in tables and judge:
                    yield from (f"IPv{family} {line}" for line in told(tables[name], rules, judge))


def changes_to(current: Tables, wanted: Mapping[str, TableRules]) -> tuple[TableChange, ...]:
    """The changes of one family; a table that neither holds nor should hold anything of ours is not touched."""
    names = [*wanted, *(name for name in current if name not in wanted)]
    if _hands_over(current.get("mangle")) and "nat" in wanted and tproxy.INBOUND not in _chains(wanted.get("mangle")):
        # What arrives meanwhile must find one of the two: the redirect that comes, or the TPROXY that goes.
        names = [*(name for name in names if name != "mangle"), "mangle"]
    made = (change(current.get(name, saved.SavedTable(name)), wanted.get(name, TableRules(name))) for name in names)
    return tuple(table for table in made if table.operations)


def _hands_over(table: saved.SavedTable | None) -> bool:
    return table is not None and tproxy.INBOUND in table.chains


def _chains(table: TableRules | None) -> tuple[str, ...]:
    return tuple(name for name, _ in table.chains) if table else ()
