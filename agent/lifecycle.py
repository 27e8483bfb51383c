"""Install and uninstall from beginning to end: lock, record, loopback address, engine, and the way back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent import loopback, state
from agent.engine_options import EngineOptions
from agent.engines.base import Engine, Removal
from agent.engines.iptables.engine import IptablesPlan, docker_dns
from agent.engines.iptables.engine import select as select_iptables
from agent.engines.registry import select
from agent.errors import HostError, TpctlError
from agent.host.privilege import require_root
from agent.policy import DnsCapture, Family, Policy

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


def install(policy: Policy, options: EngineOptions) -> InstallReport:
    """Make the kernel carry out `policy`, replacing what tpctl or kumactl installed before.

    Raises HostError when the host lacks something (nothing was touched), ApplyError when a change failed; everything is
    then as it was before, and the message says so.
    """
    require_root("tpctl install")
    engine = select(options)
    with state.locked():
        return _install(engine, policy, options)


def _install(engine: Engine[Any], policy: Policy, options: EngineOptions) -> InstallReport:
    previous = state.load()
    policy, notices = _adapted(policy)
    record = state.State(
        policy=policy,
        engine=engine.name,
        variant=engine.variant,
        phase=state.INSTALLING,
        installed_at=state.now(),
        comments=options.comments,
        # A later install must not take tpctl's own for what was there before.
        footprint=previous.footprint if previous else engine.footprint(),
    )
    state.save(record)
    added = False
    try:
        if Family.IPV6 in policy.families:
            added = loopback.add(policy.loopback)
        applied = engine.apply(engine.plan(policy))
    except TpctlError:
        if added:
            loopback.remove(policy.loopback)
        _restore_record(previous)
        raise
    if Family.IPV6 not in policy.families:
        loopback.remove(policy.loopback)
    state.save(dataclasses.replace(record, phase=state.INSTALLED))
    return InstallReport(
        engine=engine.name,
        variant=engine.variant,
        reason=engine.reason,
        families=tuple(sorted(int(family) for family in policy.families)),
        policy=policy,
        replaced=applied.replaced,
        notices=(*notices, *applied.notices),
    )


def _adapted(policy: Policy) -> tuple[Policy, list[str]]:
    """The policy, less what this host's other software rules out."""
    zones = policy.dns.capture is DnsCapture.ALL and policy.dns.split_zones
    if zones and docker_dns():
        return dataclasses.replace(policy, dns=dataclasses.replace(policy.dns, split_zones=False)), [DOCKER_ZONES]
    return policy, []


def _restore_record(previous: state.State | None) -> None:
    if previous:
        state.save(previous)
    else:
        state.clear()


def dry_run(policy: Policy, options: EngineOptions) -> str:
    """The exact restore text of each family. Touches nothing and needs no privilege.

    What would be replaced is included when it can be seen, that is, as root on a host with iptables.
    """
    if os.geteuid() == 0:
        try:
            return select(options).preview(policy)
        except HostError:
            pass  # no iptables here: the rules themselves can still be shown
    return IptablesPlan.of_policy(policy, options).render()


def uninstall(*, dry_run: bool = False) -> Removal:
    """Take away what tpctl or kumactl installed, in both variants and families, and nothing else.

    Needs no record, no user and no configuration. Raises ApplyError when the kernel refused; nothing was removed then.
    """
    require_root("tpctl uninstall")
    engine = select(EngineOptions())
    with state.locked():
        record = state.load()
        removal = engine.remove(dry_run=dry_run, footprint=record.footprint if record else None)
        removed = list(removal.removed)
        name = record.policy.loopback if record else "lo"
        if loopback.remove(name, dry_run=dry_run):
            removed.append(f"the address ::6 on {name}")
        if not dry_run:
            state.clear()
    return Removal(tuple(removed), removal.notices)


def flush(*, dry_run: bool = False) -> Removal:
    """Remove every rule and chain of nat and raw, everybody's, in both variants and families."""
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
