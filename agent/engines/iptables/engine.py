"""The iptables engine: one plan, two variants of iptables, all of it or nothing."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from agent.engine_options import EngineOptions
from agent.engines.base import Applied, Footprint, Inspection, Removal, RuleCounter, signed_by
from agent.engines.iptables import nft_hooks, saved, tools, tproxy
from agent.engines.iptables.backend import Backend, RestoreBackend, TransientError, read_tables
from agent.engines.iptables.change import TableChange, change, flushing, holdings, restore_text
from agent.engines.iptables.legacy import LegacyBackend, xtables_lock
from agent.engines.iptables.parts import FamilyRules, TableRules
from agent.engines.iptables.ruleset import rules_for
from agent.errors import ApplyError, HostError, TpctlError
from agent.host import cgroups
from agent.policy import Cgroup, Family, Policy

_LEGACY_CGROUP = (
    "warning: the legacy variant of iptables writes whole tables, and the kernel takes none that names a control group "
    "which is gone: while the service does not run, no program can change the tables nat and raw; prefer "
    "--engine nftables"
)

ROLLED_BACK = "Everything was rolled back: the rules are as they were before"

R = TypeVar("R")
Tables = Mapping[str, saved.SavedTable]


@dataclass(frozen=True, slots=True)
class IptablesPlan:
    """The rules of every family of a policy."""

    families: tuple[FamilyRules, ...]
    comments: bool = True
    cgroup: Cgroup | None = None
    """The control group that rules name by its path; the kernel looks it up when they are made."""

    @classmethod
    def of_policy(cls, policy: Policy, options: EngineOptions) -> IptablesPlan:
        """The plan for a policy."""
        families = tuple(rules_for(policy, family) for family in sorted(policy.families))
        return cls(families, options.comments, policy.cgroup)

    def render(self) -> str:
        """The restore text of each family, for a host on which nothing of ours is installed."""
        return self.render_over({})

    def render_over(self, current: Mapping[Family, Tables]) -> str:
        """The restore text of each family that replaces what `current` holds of ours."""
        families = sorted({rules.family for rules in self.families} | set(current))
        texts = {family: _changes(current.get(family, {}), self.of(family)) for family in families}
        return "\n".join(
            f"### IPv{family} ###\n{restore_text(changes, comments=self.comments)}"
            for family, changes in texts.items()
            if changes
        )

    def of(self, family: Family) -> Mapping[str, TableRules]:
        """A family's tables by name, in the order in which they are applied."""
        return {table.table: table for rules in self.families if rules.family is family for table in rules.tables}


class IptablesEngine:
    """Carries plans out with the variant chosen when it was made."""

    name = "iptables"

    def __init__(self, options: EngineOptions, choice: tools.Choice) -> None:
        self.options = options
        self.choice = choice
        self.variant = choice.variant
        self.reason = choice.reason

    def plan(self, policy: Policy) -> IptablesPlan:
        """The rules for a policy."""
        return IptablesPlan.of_policy(policy, self.options)

    def preview(self, policy: Policy) -> str:
        """The exact restore text that `apply` would use on this host now. Reads, and changes nothing."""
        backends = self._backends(self.variant, self.choice.tools)
        return self.plan(policy).render_over({family: backend.save() for family, backend in backends.items()})

    def apply(self, plan: IptablesPlan) -> Applied:
        """Replace whatever tpctl or kumactl installed by `plan`; one commit a table, rolled back as a whole."""
        self._require_tools(plan)
        if plan.cgroup:
            cgroups.find(plan.cgroup.path)  # what the kernel says of a path that is not there is no help
        backends = self._backends(self.variant, self.choice.tools)
        before = self._retrying(lambda: self._replace(backends, plan))
        replaced = _installations(self.variant, before.values())
        try:
            others, notices = self._clear_other_variant()
        except (TpctlError, OSError) as error:
            with self._exclusive(backends):
                raise ApplyError(f"{error}. {self._roll_back(backends, before)}") from error
        if plan.cgroup and self.variant == "legacy":
            notices.append(_LEGACY_CGROUP)
        return Applied((*replaced, *others), (*notices, *_unmarked_kuma_rules(before.values())))

    def inspect(self, plan: IptablesPlan | None) -> Inspection:
        """What both variants hold; drift is told against `plan` in the variant that holds our rules."""
        held = {variant: self._tables(variant) for variant in tools.VARIANTS}
        owners = {variant: _owners(held[variant].values()) for variant in tools.VARIANTS}
        holding = [variant for variant in tools.VARIANTS if "tpctl" in owners[variant]]
        foreign = tuple(f"kumactl's rules ({variant})" for variant in tools.VARIANTS if "kumactl" in owners[variant])
        ports = frozenset(port for tables in held.values() for port in _redirected_ports(tables.values()))
        if not holding:
            return Inspection(self.name, None, installed=False, foreign=foreign, redirected_ports=ports)
        variant = self.variant if self.variant in holding else holding[0]
        tables = held[variant]
        drift = tuple(line for family in tables for line in _drift(family, tables[family], plan)) if plan else ()
        if plan and plan.cgroup and not cgroups.is_current(plan.cgroup):
            drift += (cgroups.outdated(plan.cgroup),)
        if len(holding) > 1:
            drift += ("rules of tpctl are in both variants, nft and legacy",)
        families = tuple(int(family) for family in tables if _owners([tables[family]]))
        counters = tuple(_counters(tables))
        version = signed_by(counters)
        return Inspection(
            self.name, variant, True, families, drift, counters, foreign, version=version, redirected_ports=ports
        )

    def footprint(self) -> Footprint:
        """The tables and base chains of nf_tables that exist: iptables-nft makes them and never removes them."""
        return {"hooks": nft_hooks.to_json(nft_hooks.existing())}

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Remove what tpctl or kumactl installed, in both variants and families."""
        keep = nft_hooks.from_json((footprint or {}).get("hooks"))
        removed: list[str] = []
        for variant in tools.VARIANTS:
            backends = self._all_backends(variant)
            held = [line for family, backend in backends.items() for line in _listing(variant, family, backend.save())]
            removed += held
            if held and not dry_run:
                self._empty(backends)
            if variant == "nft" and not dry_run and (held or footprint is not None):
                removed += nft_hooks.remove_empty(keep)
        return Removal(tuple(removed))

    def everything(self, tables: Sequence[str]) -> list[str]:
        """Every rule and user-defined chain of the named tables, whoever made them, in both variants and families."""
        return [
            f"IPv{family} {variant} {table.name}: {line}"
            for variant in tools.VARIANTS
            for family, backend in self._all_backends(variant).items()
            for table in backend.save().values()
            if table.name in tables
            for line in (
                *(f"-A {rule.chain} {rule.text}" for rule in table.rules),
                *(f"chain {chain}" for chain, policy in table.chains.items() if policy == "-"),
            )
        ]

    def flush(self, tables: Sequence[str]) -> list[str]:
        """Remove what `everything` lists; says what went."""
        gone = self.everything(tables)
        for variant in tools.VARIANTS:
            backends = self._all_backends(variant)
            with self._exclusive(backends):
                for backend in backends.values():
                    held = (table for name, table in backend.save().items() if name in tables)
                    changes = (TableChange(table.name, tuple(flushing(table))) for table in held if not table.is_blank)
                    self._commit(backend, tuple(changes), comments=True)
        return gone

    # -- the parts of apply and remove ---------------------------------------------------------------------------------

    def _empty(self, backends: Mapping[Family, Backend]) -> None:
        self._retrying(lambda: self._replace(backends, IptablesPlan(())))

    def _replace(self, backends: Mapping[Family, Backend], plan: IptablesPlan) -> dict[Family, Tables]:
        """Replace what is ours in every family; hands back what the tables held before."""
        with self._exclusive(backends):
            before: dict[Family, Tables] = {family: backend.save() for family, backend in backends.items()}
            try:
                for family, backend in backends.items():
                    self._commit(backend, _changes(before[family], plan.of(family)), plan.comments)
            except (TpctlError, OSError) as error:
                outcome = self._roll_back(backends, before)
                kind = type(error) if isinstance(error, TpctlError) and outcome == ROLLED_BACK else ApplyError
                raise kind(f"{error}. {outcome}") from error
        return before

    def _roll_back(self, backends: Mapping[Family, Backend], before: Mapping[Family, Tables]) -> str:
        """Put every table back; says how it went."""
        try:
            for family, backend in backends.items():
                current = backend.save()
                wanted = {name: holdings(table) for name, table in before[family].items()}
                changed = {name: table for name, table in current.items() if holdings(table) != wanted.get(name)}
                self._commit(
                    backend,
                    _changes(changed, {name: wanted[name] for name in changed if name in wanted}),
                    comments=True,
                )
        except (TpctlError, OSError, ValueError) as failed:
            return f"The rollback failed too: {failed}. Run `tpctl uninstall`, then look at `tpctl status`"
        return ROLLED_BACK

    @staticmethod
    def _commit(backend: Backend, changes: tuple[TableChange, ...], comments: bool) -> None:
        if changes:
            backend.commit(changes, comments=comments)

    def _retrying(self, attempt: Callable[[], R]) -> R:
        for _ in range(self.options.max_retries):
            try:
                return attempt()
            except TransientError:
                time.sleep(self.options.sleep_between_retries_seconds)
        return attempt()

    def _exclusive(self, backends: Mapping[Family, Backend]) -> AbstractContextManager[None]:
        """nf_tables transactions are atomic and iptables-nft takes no lock; libiptc rewrites whole tables."""
        legacy = any(backend.variant == "legacy" for backend in backends.values())
        return xtables_lock(self.options.wait_seconds) if legacy else nullcontext()

    def _clear_other_variant(self) -> tuple[list[str], list[str]]:
        """Remove our rules from the variant that is not used, and warn when it holds rules of others."""
        replaced: list[str] = []
        notices = []
        for variant in tools.VARIANTS:
            if variant == self.variant:
                continue
            backends = self._all_backends(variant)
            tables = {family: backend.save() for family, backend in backends.items()}
            if _owners(tables.values()):
                self._empty(backends)
                replaced += _installations(variant, tables.values())
            if any(_holds_foreign(held) for held in tables.values()):
                notices.append(
                    f"iptables-{variant} holds rules as well, which `iptables` ({self.variant}) does not show; "
                    "both act on this host's traffic"
                )
        return replaced, notices

    # -- where things are ----------------------------------------------------------------------------------------------

    def _require_tools(self, plan: IptablesPlan) -> None:
        for rules in plan.families:
            if rules.family not in self.choice.tools:
                name = tools.command(rules.family)
                raise HostError(
                    f"IPv{rules.family} is in use on this host, but {name}-{self.variant} is not installed; "
                    "install it, or leave IPv6 alone with --ip-family-mode ipv4"
                )

    def _backends(self, variant: str, found: Mapping[Family, tools.Tools]) -> dict[Family, Backend]:
        kind = RestoreBackend if variant == "nft" else LegacyBackend
        return {family: kind(found[family], self.options) for family in sorted(found)}

    def _all_backends(self, variant: str) -> dict[Family, Backend]:
        """The backends of a variant for the families in which it could hold anything."""
        if variant == self.variant:
            return self._backends(variant, self.choice.tools)
        families = [family for family in Family if variant == "nft" or tools.legacy_tables_exist(family)]
        found = {family: found for family in families if (found := tools.find(variant, family))}
        return self._backends(variant, found)

    def _tables(self, variant: str) -> dict[Family, Tables]:
        return {family: backend.save() for family, backend in self._all_backends(variant).items()}


def select(options: EngineOptions) -> IptablesEngine:
    """The engine for the variant of this host. Raises HostError or InputError as `tools.choose` does."""
    return IptablesEngine(options, tools.choose(options))


def docker_dns() -> bool:
    """Whether Docker's embedded DNS server is wired into this network namespace, through either variant."""
    return any(
        saved.DOCKER_DNS_CHAIN in table.chains
        for variant in tools.VARIANTS
        if (found := tools.find(variant, Family.IPV4))
        for table in read_tables(found).values()
    )


def _changes(current: Tables, wanted: Mapping[str, TableRules]) -> tuple[TableChange, ...]:
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


def _owners(families: Iterable[Tables]) -> frozenset[str]:
    return frozenset(owner for tables in families for table in tables.values() for owner in table.owners())


def _redirected_ports(families: Iterable[Tables]) -> Iterator[int]:
    for tables in families:
        for table in tables.values():
            yield from table.redirected_ports()


def _installations(variant: str, families: Iterable[Tables]) -> tuple[str, ...]:
    return tuple(f"{owner}'s rules ({variant})" for owner in sorted(_owners(families)))


def _unmarked_kuma_rules(families: Iterable[Tables]) -> Iterator[str]:
    """kumactl --disable-comments leaves rules in the built-in chains that nothing tells from other software's."""
    for tables in families:
        if "kumactl" not in _owners([tables]):
            continue
        rules = [rule for table in tables.values() for rule in table.rules]
        if not any(saved.owner_of_chain(rule.chain) and saved.comment_of(rule.text) for rule in rules):
            yield from (
                "kumactl was installed without comments, so this rule may be its own; it was left: "
                f"-A {rule.chain} {rule.text}"
                for rule in rules
                if rule.chain in ("PREROUTING", "OUTPUT") and saved.looks_like_kumactl(rule.text)
            )


def _holds_foreign(tables: Tables) -> bool:
    return any(
        saved.owner_of_chain(rule.chain) is None and saved.owner_of_rule(rule.text) is None
        for table in tables.values()
        for rule in table.rules
    )


def _listing(variant: str, family: Family, tables: Tables) -> Iterator[str]:
    for table in tables.values():
        for rule in table.owned_jumps():
            yield f"IPv{family} {variant} {table.name}: -A {rule.chain} {rule.text}"
        for chain in table.owned_chains():
            yield f"IPv{family} {variant} {table.name}: chain {chain} ({len(list(table.rules_of(chain)))} rules)"


def _drift(family: Family, tables: Tables, plan: IptablesPlan) -> Iterator[str]:
    wanted = plan.of(family)
    for name in dict.fromkeys([*wanted, *tables]):
        current = tables.get(name, saved.SavedTable(name))
        expected = _canonical(wanted.get(name, TableRules(name)))
        try:
            actual = _canonical(holdings(current))
        except ValueError as error:
            yield f"IPv{family} {name}: a rule cannot be read: {error}"
            continue
        where = f"IPv{family} {name}"
        yield from difflib.unified_diff(expected, actual, f"plan {where}", f"kernel {where}", n=0, lineterm="")


def _canonical(rules: TableRules) -> list[str]:
    lines = []
    for chain, content in sorted(rules.chains):
        lines.append(f":{chain}")
        lines += [f"-A {chain} {rule.canonical().render()}" for rule in content]
    # firewalld's iptables backend keeps the direct rules of a built-in chain in a chain of its own, with this suffix.
    jumps = [(jump.chain.removesuffix("_direct"), jump.rule.canonical().render()) for jump in rules.jumps]
    return lines + [f"-A {chain} {text}" for chain, text in sorted(jumps, key=lambda jump: jump[0])]


def _counters(tables: Mapping[Family, Tables]) -> Iterator[RuleCounter]:
    for family, held in tables.items():
        for table in held.values():
            for rule in table.rules:
                if saved.owner_of_chain(rule.chain) or saved.owner_of_rule(rule.text):
                    text = saved.comment_of(rule.text) or rule.text
                    yield RuleCounter(int(family), table.name, rule.chain, text, rule.packets, rule.bytes)
