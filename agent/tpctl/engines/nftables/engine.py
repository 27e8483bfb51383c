"""The nftables engine: one table of our own, changed in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tpctl.engines import refused
from tpctl.engines.base import REDIRECTING, Applied, Footprint, Inspection, Removal, RuleCounter, signed_by
from tpctl.engines.nftables import cgroup, drain, nft, probe, scratch
from tpctl.engines.nftables.nft import Nft, NftError, Objects
from tpctl.engines.nftables.ruleset import table_for, without_nat
from tpctl.engines.nftables.table import TABLE, Table
from tpctl.engines.nftables.transaction import preparation, replacement, surplus
from tpctl.host import cgroups
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Cgroup, Family, Policy
from tpctl.system import memory
from tpctl.system.errors import ApplyError, HostError, described

BOTH_FAMILIES = 0
"""`RuleCounter.family` of a rule that serves IPv4 and IPv6 alike."""


class NftablesPlan(NamedTuple):
    """The table for a policy."""

    table: Table
    comments: bool = True
    cgroup: Cgroup | None = None
    """The control group that rules name by its path; nft looks it up when they are made."""

    @classmethod
    def of_policy(cls, policy: Policy, options: EngineOptions, where: str = TABLE) -> NftablesPlan:
        """The plan for a policy, in a table of that family and name."""
        return cls(table_for(policy)._replace(where=where), options.comments, policy.cgroup)

    def render(self) -> str:
        """The text that nft is given on a host on which nothing of ours is installed."""
        return self.render_over(None)

    def render_over(self, current: Objects | None) -> str:
        """The text that replaces `current`."""
        return replacement(current, self.table, comments=self.comments)

    def transactions(self, current: Objects | None, *, knows_sets: bool = True) -> tuple[str, str]:
        """The same as two texts: one that makes sets which no rule uses yet (may be empty), one that does the rest."""
        prepared = preparation(current, self.table) if knows_sets else ()
        first = Table(prepared, where=self.table.where).render() if prepared else ""
        return first, replacement(current, self.table, comments=self.comments, prepared=prepared)


class NftablesEngine:
    """Carries plans out through nf_tables."""

    name = "nftables"
    families = frozenset(Family)
    variant: str | None = None

    def __init__(
        self, way: Nft, options: EngineOptions, where: str = TABLE, *, kernel: probe.Kernel = probe.COMPLETE
    ) -> None:
        self.nft = way
        self.kernel = kernel
        self.options = options
        self.where = where
        self.reason = f"nf_tables works here, through {way.description}"

    def plan(self, policy: Policy) -> NftablesPlan:
        """The table for a policy."""
        return self.fitted(NftablesPlan.of_policy(policy, self.options, self.where))

    def fitted(self, plan: NftablesPlan) -> NftablesPlan:
        """A plan as this kernel can carry it out."""
        return plan if self.kernel.translates else plan._replace(table=without_nat(plan.table))

    def unguarded(self, policy: Policy) -> str | None:
        """Why the kernel cannot guard the data plane's ports, as `load` found out; None when it can."""
        return self.kernel.guard_obstacle

    def preview(self, policy: Policy) -> str:
        """The exact text that `apply` would use on this host now. Reads, and changes nothing."""
        plan = self.plan(policy)
        first, text = plan.transactions(self.current(), knows_sets=self.nft.knows_sets)
        text = cgroup.found_by_nft(text, plan.cgroup)
        return f"# first, sets that no rule uses yet\n{first}# then, in one transaction\n{text}" if first else text

    def footprint(self) -> Footprint:
        """Nothing: the table is ours alone, and nothing outside it changes."""
        return {}

    def apply(self, plan: NftablesPlan) -> Applied:
        """Replace whatever our table holds by `plan`: all rules change in one transaction.

        Sets that they look into are made before that; when the rules then do not come, they are taken away again.
        """
        cgroup.require(self.nft, plan.cgroup)
        refused.require_own(self.where)
        current = self.current()
        first, text = plan.transactions(current, knows_sets=self.nft.knows_sets)
        text = cgroup.found_by_nft(text, plan.cgroup)
        try:
            if first:
                self.nft.execute(first)
            self.nft.execute(text)
        except Exception as error:
            # A child that was killed, because it did not end in time or by others, may have been done by then.
            if not self._holds(plan):
                stay = self._unprepare(current)
                if isinstance(error, NftError):
                    state = stay or "Nothing was changed: the rules are as they were before"
                    raise ApplyError(f"nf_tables refused the rules: {error}. {state}") from error
                if stay:
                    raise ApplyError(f"{described(error)}. {stay}") from error
                raise
        held = current is not None and not drain.is_leftover(current)
        return Applied(("tpctl's rules (nftables)",) if held else (), () if self.kernel.translates else (REDIRECTING,))

    def _holds(self, plan: NftablesPlan) -> bool:
        """Whether the kernel holds exactly `plan`, as far as can be seen."""
        try:
            return not any(self._drift(plan))
        except Exception:  # noqa: BLE001 - whoever asks is about to roll back, which nothing may stop
            return False

    def _unprepare(self, before: Objects | None) -> str:
        """Take the sets away that were made for rules which did not come; what stays is handed back in words."""
        memory.give_back()
        failed = nft.taken_back(self.nft, lambda: surplus(before, self.current(), self.where))
        if not failed:
            return ""
        return (
            f"The rules are as they were before. Sets that no rule uses may be left in table {self.where}, because "
            f"removing them failed too: {failed}. The next `tpctl install` or `tpctl uninstall` will remove them"
        )

    def inspect(self, plan: NftablesPlan | None) -> Inspection:
        """What our table holds. Leftovers of an uninstall do not count as installed; see `leftovers`."""
        current = self.current()
        if current is None or drain.is_leftover(current):
            return Inspection(self.name, None, installed=False)
        families = _families(current)
        drift = tuple(self._drift(plan)) if plan else ()
        counters = tuple(_counters(current, families, self.where))
        return Inspection(self.name, None, True, families, drift, counters, version=signed_by(counters))

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Remove our table, in one transaction.

        With `draining`, connections that run through the data plane are let finish: as long as there are any, a table
        without a single redirect stays, and `drain_leftovers` removes it. A caller whose other engine took over can do
        without it.
        """
        current = self.current()
        if current is None:
            return Removal()
        removed = tuple(_listing(current, self.where))
        if dry_run:
            return Removal(removed)
        refused.require_own(self.where)
        running = drain.running(drain.redirected_ports(current)) if draining else 0
        try:
            if running:
                self.nft.execute(drain.leftover(current))
            else:
                self.nft.execute(f"delete table {self.where}\n")
        except NftError as error:
            raise ApplyError(f"nf_tables refused to remove table {self.where}: {error}. Nothing was removed") from error
        return Removal(removed, (still_running(running),) if running else ())

    def hold(self, ports: Iterable[int]) -> int:
        """Do for another engine's rules, before they go, what `remove` does for ours: let running connections finish.

        Hands back how many connections to `ports` run; with none, nothing is left.
        """
        running = drain.running(ports)
        if running:
            try:
                self.nft.execute(drain.leftover(self.current(), ports))
            except NftError as error:
                raise ApplyError(f"nf_tables refused the table {self.where}: {error}. Nothing was changed") from error
        return running

    def leftovers(self) -> int | None:
        """How many connections the leftovers of an uninstall wait for; None when there are no leftovers."""
        current = self.current()
        if current is None or not drain.is_leftover(current):
            return None
        return drain.running(drain.redirected_ports(current))

    def drain_leftovers(self) -> int | None:
        """Remove the leftovers of an uninstall once the connections they wait for have ended.

        Hands back how many still run, 0 when the leftovers were removed now, None when there were none.
        """
        running = self.leftovers()
        if running == 0:
            try:
                self.nft.execute(f"delete table {self.where}\n")
            except NftError as error:
                raise ApplyError(f"nf_tables refused to remove table {self.where}: {error}") from error
        return running

    def current(self) -> Objects | None:
        """The objects of our table; None when there is none. Raises HostError."""
        try:
            return nft.held(self.nft, self.where)
        except NftError as error:
            cause = refused.cause_in_nf_tables(str(error))
            raise cause or HostError(f"the tables of nf_tables cannot be read: {error}") from error

    def _drift(self, plan: NftablesPlan) -> Iterator[str]:
        import difflib  # here: an install of what was not there compares nothing

        if plan.cgroup and not cgroups.is_current(plan.cgroup):
            yield cgroups.outdated(plan.cgroup)
            return
        try:
            text = cgroup.found_by_nft(plan.render(), plan.cgroup)
            wanted = scratch.blocks(scratch.listing_of(self.nft, text, self.where))
            actual = scratch.blocks(self.nft.listing(f"list table {self.where}"))
        except NftError as error:
            yield f"the kernel's rules cannot be compared with the plan: {error}"
            return
        for name in dict.fromkeys([*wanted, *actual]):
            where = f"{self.where} {name}"
            yield from difflib.unified_diff(
                [name, *wanted[name]] if name in wanted else [],
                [name, *actual[name]] if name in actual else [],
                f"plan {where}",
                f"kernel {where}",
                n=0,
                lineterm="",
            )


def load(options: EngineOptions | None = None) -> NftablesEngine:
    """The engine, once the kernel was seen to accept everything it uses.

    Raises HostError when nf_tables, or something of it, does not work here; nothing was touched.
    """
    way = nft.find()
    return NftablesEngine(way, options or EngineOptions(), kernel=probe.require(way))


def still_running(count: int) -> str:
    """What the operator is told about connections that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} through the data plane and may finish: until then the table {TABLE} stays, without a "
        "redirect, and goes after that"
    )


def _listing(current: Objects, where: str) -> Iterator[str]:
    if drain.is_leftover(current):
        yield f"nftables: table {where}, left over from an earlier uninstall"
        return
    yield f"nftables: table {where}"
    rules = [item["rule"]["chain"] for item in current if "rule" in item]
    for item in current:
        if "chain" in item:
            name = item["chain"]["name"]
            yield f"nftables: chain {name} ({rules.count(name)} rules)"
        for kind in ("set", "map"):
            if kind in item:
                yield f"nftables: {kind} {item[kind]['name']} ({len(item[kind].get('elem', ()))} elements)"


def _families(current: Objects) -> tuple[int, ...]:
    """The families that reach the redirects, from the guards of the base chains' jumps."""
    found: set[int] = set()
    for rule in (item["rule"] for item in current if "rule" in item):
        expressions = rule["expr"]
        if any(part.get("jump", {}).get("target") in ("inbound", "outbound") for part in expressions):
            if rule["chain"] in ("inbound", "outbound"):
                continue
            family = _family_of(rule)
            found |= {family} if family else {int(each) for each in Family}
    return tuple(sorted(found))


def _family_of(rule: dict[str, Any]) -> int | None:
    """The one family that a rule can match, from what it compares; None for a rule of both."""
    for left, right in ((part["match"]["left"], part["match"]["right"]) for part in rule["expr"] if "match" in part):
        if left == {"meta": {"key": "nfproto"}}:
            return {"ipv4": 4, "ipv6": 6}.get(right)
        if isinstance(left, dict) and "payload" in left:
            family = {"ip": 4, "ip6": 6}.get(left["payload"].get("protocol"))
            if family:
                return family
    return None


def _counters(current: Objects, families: tuple[int, ...], where: str) -> Iterator[RuleCounter]:
    everything = families[0] if len(families) == 1 else BOTH_FAMILIES
    for rule in (item["rule"] for item in current if "rule" in item):
        counter = next((part["counter"] for part in rule["expr"] if isinstance(part.get("counter"), dict)), None)
        if counter is not None:
            text = rule.get("comment") or f"rule {rule['handle']}"
            family = _family_of(rule) or everything
            yield RuleCounter(family, where, rule["chain"], text, counter["packets"], counter["bytes"])
