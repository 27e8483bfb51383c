"""The iptables engine: one plan, two variants of iptables, all of it or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from tpctl.engines import refused
from tpctl.engines.base import REDIRECTING, Applied, Footprint, Inspection, Removal, signed_by
from tpctl.engines.iptables import listed, nft_hooks, order, saved, tools, trial
from tpctl.engines.iptables.backend import Backend, RestoreBackend, TransientError, read_tables
from tpctl.engines.iptables.change import TableChange, flushing, holdings
from tpctl.engines.iptables.legacy import LegacyBackend, xtables_lock
from tpctl.engines.iptables.listed import Tables
from tpctl.engines.iptables.plan import IptablesPlan, changes_to
from tpctl.engines.presence import legacy_tables_exist
from tpctl.host import cgroups
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy
from tpctl.system import memory
from tpctl.system.errors import ApplyError, HalfDoneError, HostError, TpctlError, described

_LEGACY_CGROUP = (
    "warning: the legacy variant of iptables writes whole tables, and the kernel takes none that names a control group "
    "which is gone: while the service does not run, no program can change the tables nat and raw; prefer "
    "--engine nftables"
)

ROLLED_BACK = "Everything was rolled back: the rules are as they were before"

R = TypeVar("R")


class IptablesEngine:
    """Carries plans out with the variant chosen when it was made."""

    name = "iptables"

    def __init__(self, options: EngineOptions, choice: tools.Choice) -> None:
        self.options = options
        self.choice = choice
        self.variant = choice.variant
        self.reason = choice.reason

    @property
    def families(self) -> frozenset[Family]:
        """Those whose programs the host has."""
        return frozenset(self.choice.tools)

    def plan(self, policy: Policy) -> IptablesPlan:
        """The rules for a policy, as this host can carry them out."""
        return IptablesPlan.of_policy(policy, self.options).without_nat(self._redirecting(policy.families))

    def _redirecting(self, families: Collection[Family]) -> list[Family]:
        """Those of the families that have no more of NAT than REDIRECT."""
        return [family for family, can in self._abilities().items() if family in families and not can.dnat]

    def unguarded(self, policy: Policy) -> str | None:
        """Why the kernel or the programs cannot guard the data plane's ports; None when they can."""
        found = ((family, can.guard_obstacle) for family, can in self._abilities().items())
        return next((f"IPv{family}: {why}" for family, why in found if why and family in policy.families), None)

    def _abilities(self) -> Mapping[Family, trial.Ability]:
        return trial.abilities(tuple(self.choice.tools.values()))

    def preview(self, policy: Policy) -> str:
        """The exact restore text that `apply` would use on this host now. Reads, and changes nothing."""
        backends = self._backends(self.variant, self.choice.tools)
        return self.plan(policy).render_over({family: backend.save() for family, backend in backends.items()})

    def apply(self, plan: IptablesPlan) -> Applied:
        """Replace whatever tpctl or kumactl installed by `plan`; one commit a table, rolled back as a whole."""
        self._require_tools(self.variant, plan, self.choice.tools)
        if plan.cgroup:
            cgroups.find(plan.cgroup.path)  # what the kernel says of a path that is not there is no help
        for rules in plan.families if self.variant == "nft" else ():
            refused.require_shareable(rules.family, [table.table for table in rules.tables])
        before = self.exchange({self.variant: plan})
        notices = [*self._other_rules(before), *listed.unmarked_kuma_rules(before[self.variant].values())]
        if self._redirecting([rules.family for rules in plan.families]):
            notices.append(REDIRECTING)
        told = plan.told_of_places(before[self.variant], order.ahead)
        notices += (f"warning: {line}" for line in told)
        if plan.cgroup and self.variant == "legacy":
            notices.append(_LEGACY_CGROUP)
        if self.options.verbose and (way := self.way(plan)):
            notices.append(f"the rules were written by {way}")
        replaced = (line for variant, held in before.items() for line in listed.installations(variant, held.values()))
        return Applied(tuple(replaced), tuple(notices))

    def exchange(self, plans: Mapping[str, IptablesPlan]) -> dict[str, dict[Family, Tables]]:
        """Make each variant hold its plan of ours or kumactl's, and nothing else of either, or nothing without a plan.

        What comes is in place before what is in another variant goes. All or nothing: raises ApplyError or HostError
        when everything is as it was before. Hands back what each variant held.
        """
        before: dict[str, dict[Family, Tables]] = {}
        used: dict[str, dict[Family, Backend]] = {}
        for variant in sorted(tools.VARIANTS, key=lambda variant: variant not in plans):
            plan = plans.get(variant, IptablesPlan(()))
            backends = used[variant] = self._all_backends(variant, plan)
            try:
                self._require_tools(variant, plan, backends)
                if variant in plans:
                    before[variant] = self._retrying(lambda: self._replace(backends, plan))  # noqa: B023 - called here
                    continue
                before[variant] = {family: backend.save() for family, backend in backends.items()}
                if listed.owners(before[variant].values()):
                    self._empty(backends, before[variant])
            except Exception as error:
                earlier = [done for done in before if done != variant and done in plans]
                if not earlier:
                    raise
                outcomes = [self._put_back(used[done], before[done]) for done in reversed(earlier)]
                outcome = next((one for one in outcomes if one != ROLLED_BACK), ROLLED_BACK)
                raise _failed(error, outcome, ApplyError) from error
        return before

    def inspect(self, plan: IptablesPlan | None) -> Inspection:
        """What both variants hold; drift is told against `plan` in the variant that holds our rules."""
        held = {variant: self.tables(variant) for variant in tools.VARIANTS}
        owners = {variant: listed.owners(held[variant].values()) for variant in tools.VARIANTS}
        holding = [variant for variant in tools.VARIANTS if "tpctl" in owners[variant]]
        kumactls = {variant: tuple(listed.families_of("kumactl", held[variant])) for variant in tools.VARIANTS}
        foreign = tuple(f"kumactl's rules ({variant})" for variant, families in kumactls.items() if families)
        foreign_families = tuple(sorted({family for families in kumactls.values() for family in families}))
        ports = frozenset(port for tables in held.values() for port in listed.redirected_ports(tables.values()))
        if not holding:
            return Inspection(
                self.name,
                None,
                installed=False,
                foreign=foreign,
                foreign_families=foreign_families,
                redirected_ports=ports,
                listed=held,
            )
        variant = self.variant if self.variant in holding else holding[0]
        tables = held[variant]
        drift = tuple(_drift(plan, tables)) if plan else ()
        if plan and plan.cgroup and not cgroups.is_current(plan.cgroup):
            drift += (cgroups.outdated(plan.cgroup),)
        if len(holding) > 1:
            drift += ("rules of tpctl are in both variants, nft and legacy",)
        families = tuple(int(family) for family in tables if listed.owners([tables[family]]))
        counters = tuple(listed.counters(tables))
        version = signed_by(counters)
        way = self.way(plan) if plan and self.options.verbose else None
        return Inspection(
            self.name,
            variant,
            True,
            families,
            drift,
            counters,
            foreign,
            foreign_families,
            version=version,
            ahead=tuple(plan.told_of_places(tables, order.ahead)) if plan else (),
            redirected_ports=ports,
            way=way,
            listed=held,
        )

    def footprint(self) -> Footprint:
        """The tables and base chains of nf_tables that exist: iptables-nft makes them and never removes them."""
        return {"hooks": nft_hooks.to_json(nft_hooks.existing())}

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Remove what tpctl or kumactl installed, in both variants and families; then the chains that are empty."""
        removed: list[str] = []
        used_nft = footprint is not None
        for variant in tools.VARIANTS:
            backends = self._all_backends(variant)
            before = {family: backend.save() for family, backend in backends.items()}
            held = [line for family, tables in before.items() for line in listed.listing(variant, family, tables)]
            removed += held
            used_nft |= variant == "nft" and bool(held)
            if held and not dry_run:
                self._empty(backends, before)
        if used_nft and not dry_run:
            removed += _without_empty_chains(nft_hooks.from_json((footprint or {}).get("hooks")))
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

    def _empty(self, backends: Mapping[Family, Backend], held: Mapping[Family, Tables]) -> None:
        """Take away what is ours, of what was `held` a moment ago."""
        first = iter([held])
        self._retrying(lambda: self._replace(backends, IptablesPlan(()), next(first, None)))

    def _replace(
        self, backends: Mapping[Family, Backend], plan: IptablesPlan, held: Mapping[Family, Tables] | None = None
    ) -> dict[Family, Tables]:
        """Replace what is ours in every family; hands back what the tables held before.

        `held` is that, if it was read just now. Whoever has to lock the tables reads them once more, under the lock.
        """
        with self._exclusive(backends) as is_locked:
            before = dict(held) if held is not None and not is_locked else None
            before = before or {family: backend.save() for family, backend in backends.items()}
            try:
                for family, backend in backends.items():
                    self._commit(backend, plan.changes(family, before[family]), plan.comments)
            except Exception as error:
                outcome = self._roll_back(backends, before)
                raise _failed(error, outcome, type(error) if isinstance(error, TpctlError) else ApplyError) from error
        return before

    def _roll_back(self, backends: Mapping[Family, Backend], before: Mapping[Family, Tables]) -> str:
        """Put every table back; says how it went."""
        memory.give_back()
        try:
            for family, backend in backends.items():
                current = backend.save()
                wanted = {name: holdings(table) for name, table in before[family].items()}
                changed = {name: table for name, table in current.items() if holdings(table) != wanted.get(name)}
                self._commit(
                    backend,
                    changes_to(changed, {name: wanted[name] for name in changed if name in wanted}),
                    comments=True,
                )
        except Exception as failed:  # noqa: BLE001 - what stopped the rules is what the user has to know, too
            return f"The rollback failed too: {described(failed)}. Run `tpctl uninstall`, then look at `tpctl status`"
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

    def way(self, plan: IptablesPlan) -> str | None:
        """By what `apply` gives a plan to the kernel, where there is a choice."""
        if self.variant != "legacy":
            return None
        ways = {
            LegacyBackend(found, self.options).way(changes_to({}, plan.of(family)), comments=plan.comments)
            for family, found in self.choice.tools.items()
            if plan.of(family)
        }
        return "; ".join(sorted(ways)) or None

    @contextmanager
    def _exclusive(self, backends: Mapping[Family, Backend]) -> Iterator[bool]:
        """nf_tables transactions are atomic, and iptables-nft takes no lock; of x_tables, whole tables are written.

        Hands over whether it takes a lock.
        """
        legacy = any(backend.variant == "legacy" for backend in backends.values())
        with xtables_lock(self.options.wait_seconds) if legacy else nullcontext():
            yield legacy

    def _put_back(self, backends: Mapping[Family, Backend], before: Mapping[Family, Tables]) -> str:
        with self._exclusive(backends):
            return self._roll_back(backends, before)

    def _other_rules(self, before: Mapping[str, Mapping[Family, Tables]]) -> Iterator[str]:
        """A warning where the variant that is not used holds rules of others."""
        for variant, tables in before.items():
            if variant != self.variant and any(listed.holds_foreign(held) for held in tables.values()):
                yield (
                    f"iptables-{variant} holds rules as well, which `iptables` ({self.variant}) does not show; "
                    "both act on this host's traffic"
                )

    # -- where things are ----------------------------------------------------------------------------------------------

    @staticmethod
    def _require_tools(variant: str, plan: IptablesPlan, found: Mapping[Family, object]) -> None:
        for rules in plan.families:
            if rules.family not in found:
                name = tools.command(rules.family)
                raise HostError(
                    f"IPv{rules.family} is in use on this host, but {name}-{variant} is not installed; "
                    "install it, or leave IPv6 alone with --ip-family-mode ipv4"
                )

    def _backends(self, variant: str, found: Mapping[Family, tools.Tools]) -> dict[Family, Backend]:
        kind = RestoreBackend if variant == "nft" else LegacyBackend
        return {family: kind(found[family], self.options) for family in sorted(found)}

    def _all_backends(self, variant: str, plan: IptablesPlan | None = None) -> dict[Family, Backend]:
        """The backends of a variant for the families in which it could hold anything, and for those of a plan."""
        if variant == self.variant:
            return self._backends(variant, self.choice.tools)
        planned = {rules.family for rules in plan.families} if plan else set()
        families = [family for family in Family if variant == "nft" or family in planned or legacy_tables_exist(family)]
        found = {family: found for family in families if (found := tools.find(variant, family))}
        return self._backends(variant, found)

    def tables(self, variant: str) -> dict[Family, Tables]:
        """What the tables of a variant hold, in every family."""
        return {family: backend.save() for family, backend in self._all_backends(variant).items()}


def select(options: EngineOptions) -> IptablesEngine:
    """The engine for the variant of this host. Raises HostError or InputError as `tools.choose` does."""
    return IptablesEngine(options, tools.choose(options))


def _failed(error: Exception, outcome: str, kind: type[TpctlError]) -> TpctlError:
    """What is raised for an error, after the attempt to put the rules back."""
    return (kind if outcome == ROLLED_BACK else HalfDoneError)(f"{described(error)}. {outcome}")


def _without_empty_chains(keep: frozenset[nft_hooks.Hook]) -> tuple[str, ...]:
    """What `nft_hooks.remove_empty` removes. Raises ApplyError: the rules are gone by then."""
    try:
        return nft_hooks.remove_empty(keep)
    except ApplyError as error:
        raise ApplyError(
            f"the empty chains of iptables-nft: {error}; they stay, but no traffic is redirected any more"
        ) from error


def _drift(plan: IptablesPlan, held: Mapping[Family, Tables]) -> Iterator[str]:
    for family, tables in held.items():
        yield from listed.drift(family, tables, plan.beside(family, tables))
    yield from plan.told_of_places(held, order.misplaced)


def docker_dns() -> bool:
    """Whether Docker's embedded DNS server is wired into this network namespace, through either variant."""
    return any(
        saved.DOCKER_DNS_CHAIN in table.chains
        for variant in tools.VARIANTS
        if (found := tools.find(variant, Family.IPV4))
        for table in read_tables(found).values()
    )
