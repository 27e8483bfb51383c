"""Install and apply from beginning to end: lock, record, loopback address, engines, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import tpctl
from tpctl.change import confirm, device_routes, facts, finishing, loopback, routing, steps
from tpctl.change.undo import INSTALLED_AGAIN, ROLLED_BACK
from tpctl.engines import registry
from tpctl.engines.base import Engine
from tpctl.host import cgroups
from tpctl.host.privilege import require_root
from tpctl.persist import in_step
from tpctl.record import state, taken_back
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy
from tpctl.system import memory
from tpctl.system.errors import ApplyError, InputError


class InstallReport(NamedTuple):
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


def install(
    policy: Policy,
    options: EngineOptions,
    *,
    inputs: Mapping[str, Any] | None = None,
    confirm_within: float | None = None,
) -> InstallReport:
    """Make the kernel carry out `policy`, replacing what tpctl or kumactl installed before.

    `inputs` is the configuration it was made of, for the record.

    With `confirm_within` (seconds) it is taken back by itself unless it is confirmed in time (`tpctl.change.confirm`).
    What was there goes only after the new rules are in place, so no captured connection passes or fails meanwhile.
    Raises HostError when the host lacks something (nothing was touched), ApplyError when a change failed; everything is
    then as it was before, and the message says so.
    """
    require_root("tpctl install")
    memory.require()
    selection = registry.select(options)
    if options.reload_firewalld:
        in_step.require_firewalld()
    elif selection.engine.name == "iptables":
        in_step.await_firewalld()
    with state.locked():
        taken_back.forget()
        previous = state.load()
        adapted, notices = facts.adapted(policy.through(selection.engine.name), selection.engine)
        record = dataclasses.replace(_record(selection.engine, adapted, options, previous), inputs=inputs)
        report = report_of(selection.engine, selection.reason, adapted, notices)
        if (
            previous
            and _same(previous, record)
            and not _differs(selection.engine, adapted)
            and not in_step.change(record)
        ):
            if previous.inputs != inputs:
                state.save(dataclasses.replace(previous, inputs=inputs))
            return _unchanged(report, "install", previous, confirm_within)
        with confirm.guarded("install", confirm_within, previous) as pending:
            done = carry_out(selection.engine, record, previous, report)
            if options.store_firewalld and options.reload_firewalld:
                _reload_firewalld(selection.engine, adapted)
            return done._replace(pending=pending)


def apply(*, confirm_within: float | None = None) -> InstallReport:
    """Make the kernel hold the recorded policy again, brought up to date with what the host says now.

    Raises InputError when nothing is on record.
    """
    require_root("tpctl apply")
    memory.require()
    with state.locked():
        record = state.load()
        if record is None:
            raise InputError("nothing is on record in this network namespace; use tpctl install")
        selection = registry.select(record.options)
        current = facts.now(record, selection.engine)
        policy = with_current_cgroup(current.policy)
        report = report_of(selection.engine, "it is on record", policy, facts.notices(current))
        is_held = record.phase == state.INSTALLED and record.policy == policy
        if is_held and not _differs(selection.engine, policy):
            return _unchanged(report, "apply", record, confirm_within)
        with confirm.guarded("apply", confirm_within, record) as pending:
            renewed = dataclasses.replace(record, policy=policy, version=tpctl.__version__)
            return carry_out(selection.engine, renewed, record, report)._replace(pending=pending)


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
    return report._replace(changed=False, pending=pending)


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
    others = (other for other in registry.available(EngineOptions(), known=engine) if other.name != engine.name)
    return (
        not found.installed
        or bool(found.drift or found.foreign)
        or found.variant != engine.variant
        or missing_address
        or missing_route
        or bool(device_routes.lacking(policy))
        or any(held.installed or held.foreign for held in (other.inspect(None) for other in others))
    )


def carry_out(
    engine: Engine[Any],
    record: state.State,
    previous: state.State | None,
    report: InstallReport,
    renewal: state.Renewal | None = None,
) -> InstallReport:
    """Install what `record` says in place of `previous`, all or nothing. To be called under the lock.

    `renewal` is that of the record, if it has begun.
    """
    from tpctl.change.installation import Installation

    made = Installation(engine, record, previous, renewal)
    steps.carry_out(made.steps(), INSTALLED_AGAIN if previous else ROLLED_BACK)
    notices = (*report.notices, *made.notices, *finishing.see_to(made.left))
    return report._replace(replaced=made.replaced, notices=notices)


def _reload_firewalld(engine: Engine[Any], policy: Policy) -> None:
    in_step.reload()
    if _differs(engine, policy):
        raise ApplyError("firewalld has reloaded, but the kernel does not hold the policy: see `tpctl status`")
