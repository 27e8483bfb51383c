"""What is installed, whether the kernel still holds it, and whether the data plane is there to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import tpctl
from tpctl.change import confirm, device_routes, draining, facts, finishing, health, routing
from tpctl.change.listening import PortStatus
from tpctl.engines import registry
from tpctl.engines.base import Inspection
from tpctl.host.proc import in_first_namespace
from tpctl.record import state, taken_back
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import BoundSockets, Policy
from tpctl.system.errors import ApplyError, HostError

if TYPE_CHECKING:
    from tpctl.engines.listings import Listings


class Report(NamedTuple):
    """Everything `tpctl status` tells."""

    record: state.State | None
    inspection: Inspection
    ports: tuple[PortStatus, ...]
    problems: tuple[str, ...]
    """What is not as it should be; empty when all is well."""
    draining: int = 0
    """Connections through the data plane that an uninstall lets finish; a table without redirects stays until then."""
    pending: confirm.Pending | None = None
    """A change that awaits its confirmation."""
    warnings: tuple[str, ...] = ()
    """What may go wrong later."""
    next_boot: tuple[str, ...] | None = None
    """What will install something at the next boot; None where a boot means nothing, in other network namespaces."""
    taken_back: taken_back.TakenBack | None = None
    """The last change, if nobody confirmed it in time."""


def report(listings: Listings | None, *, verbose: bool = False) -> Report:
    """Read the record and the kernel of this network namespace. Raises HostError when there is no tool to look with.

    `listings` are those by which the caller looks at others' rules, too; None when there are none.
    """
    record = state.load()
    options = replace(record.options if record else EngineOptions(), verbose=verbose)
    recorded = options.engine if record else None
    found: dict[str, Inspection] = {}
    changed: list[str] = []
    for engine in registry.available(options, planning=recorded):
        plan = engine.plan(record.policy) if record and engine.name == recorded else None
        inspection = found[engine.name] = engine.inspect(plan)
        if listings is not None and inspection.listed is not None:
            listings.know(inspection.listed)
        if record and engine.name == recorded:
            changed = facts.problems(facts.now(record, engine))
    if not found:
        raise HostError("this host has neither nftables nor iptables; install one of them")
    holding = [name for name, inspection in found.items() if inspection.installed]
    shown = found[recorded if recorded in holding else (holding or list(found))[0]]
    ports: tuple[PortStatus, ...] = ()
    if record and shown.installed:
        ports = health.port_statuses(record.policy, shown.engine, shown.registered)
    running = _tidied(record, holding)
    transparent = record is not None and record.policy.inbound.is_transparent and shown.installed
    can_look = recorded is None or recorded in found or recorded == "ebpf"  # whose pins tell that it has gone
    problems = [*_problems(record, shown, ports, can_look=can_look)]
    if record and transparent and not record.policy.families <= routing.present():
        problems.append(
            f"the rule or route of the routing table {routing.TABLE} is missing: answers to clients in whose name the "
            "data plane dials leave this host; `tpctl apply` brings them back"
        )
    problems += changed
    if record and shown.installed:
        problems += health.loopback_problems(record.policy)
        problems += _unreachable_from(record.policy)
        if listings is not None and not listings.are_ours(shown.variant):
            from tpctl.engines import precedence

            problems += precedence.problems(record.policy, shown.engine, shown.variant, listings)
    problems += [f"the {name} engine's rules are installed as well" for name in holding if name != shown.engine]
    problems += [f"{foreign} are installed" for one in found.values() for foreign in one.foreign]
    pending = confirm.load()
    if pending and pending.is_overdue:
        problems.append(
            f"a change ({pending.command}) was neither confirmed nor taken back in time: its guardian is gone; "
            "run `tpctl confirm` or `tpctl rollback`; the next install or apply takes it back, too"
        )
    warnings = tuple(health.port_warnings(record.policy)) if record and shown.installed else ()
    trace = taken_back.load()
    return Report(record, shown, ports, tuple(problems), running, pending, warnings, _next_boot(), trace)


def _unreachable_from(policy: Policy) -> Iterator[str]:
    """Interfaces from which a bound socket does not reach the data plane, where that matters."""
    if policy.bound_sockets is BoundSockets.REDIRECT and (names := device_routes.lacking(policy)):
        yield (
            f"sockets that are bound to {', '.join(names)} do not reach the data plane: their redirected connections "
            "are dropped; `tpctl apply` adds the missing routes"
        )


def _tidied(record: state.State | None, holding: list[str]) -> int:
    """Remove what an earlier uninstall left, if nothing needs it any more; hands back how many connections still do.

    While another tpctl works, and after it has, they are only counted: it may well be the one that waits for them.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(state.locked(wait=0.0, is_way_out=True))
        except ApplyError:
            return draining.waiting(state.load_policy())
        if state.load() == record:
            return finishing.tidy(record, holding)
    return draining.waiting(state.load_policy())


def _next_boot() -> tuple[str, ...] | None:
    if not in_first_namespace():
        return None
    from tpctl.persist.outlook import next_boot

    return next_boot()


def _problems(
    record: state.State | None, inspection: Inspection, ports: Iterable[PortStatus], *, can_look: bool
) -> Iterator[str]:
    if record and record.phase != state.INSTALLED:
        yield "an install was interrupted; run `tpctl install` again, or `tpctl uninstall`"
    if record and inspection.installed and inspection.engine != record.options.engine:
        recorded = record.options.engine
        yield f"the {recorded} engine is on record, but the {inspection.engine} engine's rules are installed"
    if record and not can_look:
        yield (
            f"the {record.options.engine} engine has installed rules here, by the record, but what it takes to see "
            "them is gone: install it again"
        )
    elif record and not inspection.installed:
        yield "tpctl is on record, but the kernel holds none of its rules; `tpctl apply` brings them back"
    if inspection.installed and not record:
        by = f" {inspection.version}" if inspection.version else ""
        yield f"rules of tpctl{by} are installed, but there is no record of the policy; run `tpctl install` again"
    elif inspection.version and inspection.version != tpctl.__version__:
        yield (
            f"tpctl {inspection.version} installed the rules, and this is tpctl {tpctl.__version__}: `tpctl apply` "
            "replaces them without a gap"
        )
    if inspection.drift:
        yield "the kernel's rules differ from the plan: see drift; `tpctl apply` puts them right"
    yield from inspection.ahead
    yield from (port.problem for port in ports if port.problem)
