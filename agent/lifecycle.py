"""Install, apply and uninstall from beginning to end: lock, record, loopback address, engines, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import agent
from agent import confirm, loopback, routing, state
from agent.engine_options import EngineOptions
from agent.engines import registry
from agent.engines.base import Engine, Removal
from agent.errors import ApplyError, HostError, InputError
from agent.host import cgroups
from agent.host.privilege import require_root
from agent.persist import in_step
from agent.policy import DnsCapture, Family, Policy
from agent.undo import INSTALLED_AGAIN, KUMACTLS_GONE, REMOVED, ROLLED_BACK, Failures, Undo

FLUSHED_TABLES = ("nat", "raw")
DOCKER_ZONES = (
    "DNS queries are not kept in conntrack zones: all DNS is captured, and Docker's embedded DNS server "
    "rewrites ports of the same queries"
)


@dataclass(frozen=True, slots=True)
class InstallReport:
    """What an install did."""

    engine: str
    variant: str | None
    reason: str
    """Why this engine and variant."""
    families: tuple[int, ...]
    policy: Policy
    replaced: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    changed: bool = True
    """False when exactly this was installed already."""
    pending: confirm.Pending | None = None
    """The confirmation it awaits."""


def install(policy: Policy, options: EngineOptions, *, confirm_within: float | None = None) -> InstallReport:
    """Make the kernel carry out `policy`, replacing what tpctl or kumactl installed before.

    With `confirm_within` (seconds) it is taken back by itself unless it is confirmed in time (`agent.confirm`).
    What was there goes only after the new rules are in place, so no captured connection passes or fails meanwhile.
    Raises HostError when the host lacks something (nothing was touched), ApplyError when a change failed; everything is
    then as it was before, and the message says so.
    """
    require_root("tpctl install")
    selection = registry.select(options)
    if options.reload_firewalld:
        in_step.require_firewalld()
    elif selection.engine.name == "iptables":
        in_step.await_firewalld()
    with state.locked():
        previous = state.load()
        adapted, notices = _adapted(policy)
        record = _record(selection.engine, adapted, options, previous)
        report = report_of(selection.engine, selection.reason, adapted, notices)
        if (
            previous
            and _same(previous, record)
            and not _differs(selection.engine, adapted)
            and not in_step.change(record)
        ):
            return _unchanged(report, "install", previous, confirm_within)
        with confirm.guarded("install", confirm_within, previous) as pending:
            done = carry_out(selection.engine, record, previous, report)
            if options.store_firewalld and options.reload_firewalld:
                _reload_firewalld(selection.engine, adapted)
            return dataclasses.replace(done, pending=pending)


def apply(*, confirm_within: float | None = None) -> InstallReport:
    """Make the kernel hold the recorded policy again. Raises InputError when nothing is on record."""
    require_root("tpctl apply")
    with state.locked():
        record = state.load()
        if record is None:
            raise InputError("nothing is on record in this network namespace; use tpctl install")
        selection = registry.select(record.options)
        policy = with_current_cgroup(record.policy)
        report = report_of(selection.engine, "it is on record", policy, [])
        is_held = record.phase == state.INSTALLED and record.policy == policy
        if is_held and not _differs(selection.engine, policy):
            return _unchanged(report, "apply", record, confirm_within)
        with confirm.guarded("apply", confirm_within, record) as pending:
            renewed = dataclasses.replace(record, policy=policy, version=agent.__version__)
            return dataclasses.replace(carry_out(selection.engine, renewed, record, report), pending=pending)


def with_current_cgroup(policy: Policy) -> Policy:
    """The policy with the control group that has its path now: a service that was started anew has a new one.

    Raises HostError when there is none.
    """
    if policy.cgroup is None:
        return policy
    return dataclasses.replace(policy, cgroup=cgroups.find(policy.cgroup.path))


def _unchanged(report: InstallReport, command: str, record: state.State, within: float | None) -> InstallReport:
    """The report of a command that found everything done; what awaits confirmation still does, or again.

    Unless what stood there before is there again: neither a change that was interrupted at its beginning, nor its way
    back that was at the very end, leaves anything to confirm.
    """
    pending = confirm.load()
    if pending and pending.before.record == record:
        confirm.drop(pending)
        pending = None
    elif pending and within is not None:
        with confirm.guarded(command, within, None) as pending:
            pass
    return dataclasses.replace(report, changed=False, pending=pending)


def _record(engine: Engine[Any], policy: Policy, options: EngineOptions, previous: state.State | None) -> state.State:
    footprints = dict(previous.footprints) if previous else {}
    if engine.name not in footprints:  # a later install must not take tpctl's own for what was there before
        footprints[engine.name] = engine.footprint()
    used = dataclasses.replace(options, engine=engine.name, iptables_mode=engine.variant or "auto")
    return state.State(policy=policy, installed_at=state.now(), options=used, footprints=footprints)


def report_of(engine: Engine[Any], reason: str, policy: Policy, notices: list[str]) -> InstallReport:
    """The report of an install that is about to happen."""
    families = tuple(sorted(int(family) for family in policy.families))
    return InstallReport(engine.name, engine.variant, reason, families, policy, notices=tuple(notices))


def _same(previous: state.State, record: state.State) -> bool:
    """Whether exactly this is on record, installed by this version of tpctl: another one's rules may differ."""
    held = (previous.phase, previous.policy, previous.options, previous.version)
    return held == (state.INSTALLED, record.policy, record.options, record.version)


def _differs(engine: Engine[Any], policy: Policy) -> bool:
    """Whether the kernel holds anything but exactly this policy through exactly this engine."""
    found = engine.inspect(engine.plan(policy))
    missing_address = Family.IPV6 in policy.families and not loopback.present(policy.loopback)
    missing_route = policy.inbound.is_transparent and not policy.families <= routing.present()
    others = (other for other in registry.available(EngineOptions()) if other.name != engine.name)
    return (
        not found.installed
        or bool(found.drift or found.foreign)
        or found.variant != engine.variant
        or missing_address
        or missing_route
        or any(held.installed or held.foreign for held in (other.inspect(None) for other in others))
    )


def carry_out(
    engine: Engine[Any], record: state.State, previous: state.State | None, report: InstallReport
) -> InstallReport:
    """Install what `record` says in place of `previous`, all or nothing. To be called under the lock."""
    from agent import draining, ended

    policy = record.policy
    engines = registry.holding(previous.options if previous else None)
    older = _older(engine, record, previous)
    in_file = in_step.change(record, previous)
    ending = not policy.inbound.is_transparent and _may_have_routes(previous)
    renewal = state.begin(record)
    undo = Undo()
    undo.add(renewal.undo, changes_kernel=False)
    outcome = INSTALLED_AGAIN if previous else ROLLED_BACK
    try:
        if Family.IPV6 in policy.families and loopback.add(policy.loopback):
            undo.add(lambda: loopback.remove(policy.loopback), changes_kernel=False)
        if policy.inbound.is_transparent and (routed := routing.add(policy.loopback, policy.families)):
            undo.add(lambda: routing.remove(routed), changes_kernel=False)
        if ending:
            _hold_answers(previous)
        applied = engine.apply(engine.plan(policy))
        undo.add(lambda: _take_back(engine, record, previous))
        if not previous and any("kumactl" in one for one in applied.replaced):
            outcome = KUMACTLS_GONE
        others = draining.remove_others(engine, engines, record.footprints)
        answers: tuple[str, ...] = ()
        if ending:
            if previous:
                undo.add(lambda: routing.add(previous.policy.loopback, previous.policy.families), changes_kernel=False)
            _, answers = _end_routes()
        elif policy.inbound.is_transparent:
            _take_over_routes(policy)
        if Family.IPV6 not in policy.families and _end_address(policy.loopback)[0]:
            undo.add(lambda: loopback.add(policy.loopback))
        if in_file:
            undo.add(in_file.opposite().carry_out)
            in_file.carry_out()
        else:
            in_step.tidy(record)
        if engine.name != "ebpf":  # whose programs do not ask conntrack
            ended.forget()  # before the record says that all is done: killed here, the next install does it again
        renewal.finish()
    except Exception as error:  # noqa: BLE001 - out of memory, or a defect of ours: nothing half done is left then, too
        undo.roll_back(error, outcome)
    upgraded = (f"what tpctl {older} installed",) if older else ()
    gone = (*upgraded, *applied.replaced, *others.removed)
    notices = (*report.notices, *applied.notices, *others.notices, *answers)
    return dataclasses.replace(report, replaced=gone, notices=notices)


def _may_have_routes(previous: state.State | None) -> bool:
    return (previous is None or previous.policy.inbound.is_transparent) and bool(routing.present())


def _hold_answers(previous: state.State | None) -> None:
    """Before the rules of TPROXY go."""
    from agent import draining

    if routing.present():
        draining.hold_answers(previous.policy if previous else None)


def _end_routes(*, dry_run: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """After they went. Hands back what went with them, and notices."""
    from agent import draining

    running, removed = draining.tidy_answers(dry_run=dry_run)
    return removed, (draining.dialled_run(running),) if running else ()


def _end_address(name: str, *, dry_run: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take ::6 away if nothing needs it. Hands back what went, and notices."""
    from agent import draining

    running, gone = draining.tidy_address(name, dry_run=dry_run)
    removed = (f"the address ::6 on {name}",) if gone else ()
    return removed, (draining.address_runs(running, name),) if running else ()


def _take_over_routes(policy: Policy) -> None:
    """The rules of TPROXY are there, so what an earlier end of them has left is not needed, nor other families'."""
    from agent import draining

    draining.release_answers()
    routing.remove(frozenset(Family) - policy.families)


def _older(engine: Engine[Any], record: state.State, previous: state.State | None) -> str | None:
    """The other version of tpctl that installed what stands there now: by the record, or else by the rules."""
    found = previous.version if previous else engine.inspect(None).version
    return found if found != record.version else None


def _reload_firewalld(engine: Engine[Any], policy: Policy) -> None:
    in_step.reload()
    if _differs(engine, policy):
        raise ApplyError("firewalld has reloaded, but the kernel does not hold the policy: see `tpctl status`")


def _take_back(engine: Engine[Any], record: state.State, previous: state.State | None) -> None:
    """Put what `previous` says in place of what `engine` has just installed."""
    if previous:
        before = registry.select(previous.options).engine
        before.apply(before.plan(previous.policy))
    if previous is None or previous.options.engine != engine.name:
        engine.remove(footprint=record.footprints.get(engine.name), draining=False)


def _adapted(policy: Policy) -> tuple[Policy, list[str]]:
    """The policy, less what this host's other software rules out."""
    if policy.dns.capture is DnsCapture.ALL and policy.dns.split_zones:
        from agent.engines.iptables.engine import docker_dns

        if docker_dns():
            return dataclasses.replace(policy, dns=dataclasses.replace(policy.dns, split_zones=False)), [DOCKER_ZONES]
    return policy, []


def uninstall(*, dry_run: bool = False, confirm_within: float | None = None, keep_units: bool = False) -> Removal:
    """Take away what tpctl or kumactl installed, by every engine, in every variant and family, and nothing else.

    Needs no record, no user and no configuration. Raises ApplyError when the kernel refused, HostError when the host
    has no tool at all to look with. What would install it again at the next boot goes too, except with `keep_units`.
    """
    require_root("tpctl uninstall")
    with state.locked():
        record, pending = state.load(), confirm.load()
        if confirm_within is not None:
            # A reboot before the confirmation is a way back too, so the units stay until it has come.
            with confirm.guarded("uninstall", confirm_within, record) as armed:
                removal = remove_everything(record)
            if armed and not removal.removed and pending is None:
                confirm.drop(armed)
            return removal
        removal = remove_everything(record, dry_run=dry_run)
        failures = Failures()
        if not keep_units:
            with failures.kept():
                files = in_step.remove_files(dry_run=dry_run)
                removal = dataclasses.replace(removal, removed=(*removal.removed, *files))
        if not dry_run:  # the way out is never barred, and whoever took it needs no way back
            with failures.kept():
                confirm.drop(pending)
        failures.raise_if_any(REMOVED)
        return removal


def remove_everything(record: state.State | None, *, dry_run: bool = False) -> Removal:
    """Take away all that is tpctl's or kumactl's, and the record. To be called under the lock."""
    from agent import draining, ended

    engines = registry.holding(record.options if record else None)
    if not engines:
        raise HostError("this host has neither nftables nor iptables to look with; install one of them")
    removed: list[str] = []
    notices: list[str] = []
    in_files = in_step.remove(record, removed, dry_run=dry_run)
    if not dry_run:
        _hold_answers(record)
    failures = Failures()
    for engine in engines:
        with failures.kept():
            footprint = record.footprints.get(engine.name) if record else None
            removal = draining.remove(engine, footprint, dry_run=dry_run)
            removed += removal.removed
            notices += removal.notices
    rest = "The rest was removed. " if removed and not dry_run else ""
    failures.raise_if_any(f"{rest}Run `tpctl uninstall` again; `tpctl status` shows what is installed now")
    name = record.policy.loopback if record else "lo"
    with failures.kept():
        addresses, needed = _end_address(name, dry_run=dry_run)
        removed += addresses
        notices += needed
    with failures.kept():
        routes, answers = _end_routes(dry_run=dry_run)
        removed += routes
        notices += answers
    with failures.kept():
        if in_files:  # and the record stays: in other network namespaces, only it tells that the files are about us
            raise ApplyError(in_files)
        if not dry_run:
            ended.forget()
            state.clear()
    failures.raise_if_any(REMOVED)
    return Removal(tuple(removed), tuple(notices))


def flush(*, dry_run: bool = False) -> Removal:
    """Remove every rule and chain of nat and raw, everybody's, in both variants and families of iptables."""
    from agent.engines.iptables.engine import select as select_iptables

    require_root("tpctl uninstall --flush")
    engine = select_iptables(EngineOptions())
    if dry_run:
        return Removal(tuple(engine.everything(FLUSHED_TABLES)))
    ours = uninstall()
    with state.locked():
        others = engine.flush(FLUSHED_TABLES)
    return Removal((*ours.removed, *_unique(others, ours.removed)), ours.notices)


def _unique(items: Iterable[str], known: Iterable[str]) -> list[str]:
    seen = set(known)
    return [item for item in items if item not in seen]
