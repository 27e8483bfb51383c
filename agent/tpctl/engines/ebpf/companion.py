"""What eBPF programs cannot do is done by nf_tables beside them, in a table of its own.

Packets that are forwarded for a container meet no socket of this host, nothing but conntrack knows which packet is
invalid, and before Linux 5.9 no program chooses the socket of a connection that arrives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tpctl.engines.base import Inspection
from tpctl.engines.nftables import cgroup, drain, guard, nft, probe
from tpctl.engines.nftables.engine import NftablesEngine, NftablesPlan, still_running
from tpctl.engines.nftables.nft import NftError
from tpctl.engines.nftables.ruleset import table_for
from tpctl.engines.nftables.table import FAMILY, NAME, Chain, Rule, Table
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Cgroup, Dns, Inbound, Outbound, Policy, PortRange
from tpctl.spec.ssh_guard import captures
from tpctl.system import memory
from tpctl.system.errors import HalfDoneError, HostError, described

TABLE = f"{FAMILY} {NAME}_ebpf"
INVALID_PACKETS = "invalid packets"
GUARD = "the guard of the data plane's own ports"


@dataclass(frozen=True, slots=True)
class Companion:
    """What the table is for, and what it holds."""

    purposes: tuple[str, ...]
    plan: NftablesPlan


def companion_of(policy: Policy, *, chooses_sockets: bool, comments: bool = True) -> Companion | None:
    """The table beside the programs for a policy; None when they can do all of it. Pure.

    `chooses_sockets` is whether the kernel has sk_lookup programs.
    """
    beside = _left_to_nftables(policy, chooses_sockets)
    if beside is None:
        return None
    table = table_for(beside)
    chains = tuple(chain for chain in table.chains if _sees_arrivals(chain))
    group = policy.cgroup if policy.guard_ports else None
    if group:
        chains += tuple(_guard_of_others(table, group))
    return Companion(
        tuple(_purposes(policy, chooses_sockets)),
        NftablesPlan(table._replace(chains=chains, where=TABLE), comments, group),
    )


def _guard_of_others(table: Table, group: Cgroup) -> Iterator[Chain]:
    """The guard for what processes outside the control group open, which no program sees.

    What processes inside open to the data plane's ports is left alone: it may be redirected to there.
    """
    judged = Rule(cgroup.match(group), "return", f"g1: inside the cgroup {group}, the programs judge")
    for chain in table.chains:
        if chain.name == guard.GUARD_OUTPUT:
            yield chain
        if chain.name == guard.GUARD_OWN:
            yield chain._replace(rules=(judged, *chain.rules))


def _left_to_nftables(policy: Policy, chooses_sockets: bool) -> Policy | None:
    inbound = _ports_of_containers(policy) if chooses_sockets else policy.inbound
    guards = _leaves_guard(policy, chooses_sockets)
    if not (inbound.enabled or policy.virtual_networks or policy.drop_invalid or guards):
        return None
    return dataclasses.replace(
        policy,
        inbound=inbound,
        outbound=Outbound(enabled=False, port=policy.outbound.port),
        dns=Dns(port=policy.dns.port, tcp=policy.dns.tcp),
        cgroup=None,
        guard_ports=guards,
    )


def _leaves_guard(policy: Policy, chooses_sockets: bool) -> bool:
    """Whether a part of the guard is beyond the programs.

    They see nobody outside the control group they are attached to, cannot tell a container's redirected connection from
    one that was opened to the same port, and choose the sockets of what arrives only with sk_lookup.
    """
    return policy.guard_ports and bool(policy.cgroup or policy.virtual_networks or not chooses_sockets)


def unguarded(policy: Policy, *, chooses_sockets: bool) -> str | None:
    """Why nf_tables cannot do its part of the guard; None when it can, or has none."""
    if not _leaves_guard(policy, chooses_sockets):
        return None
    try:
        way = nft.find()
        obstacle = probe.require(way).guard_obstacle
        cgroup.require(way, policy.cgroup)
    except HostError as error:
        return str(error)
    return obstacle


def _ports_of_containers(policy: Policy) -> Inbound:
    """What arrives for the ports containers are redirected to.

    The programs cannot tell a container's redirected connection from one that another host opened to such a port, so
    they leave both alone, and the latter is redirected here.
    """
    if not policy.virtual_networks:
        return Inbound(enabled=False, port=policy.inbound.port)
    ports = tuple(PortRange(port) for port in ports_of_containers(policy) if captures(policy.inbound, port))
    if not ports:
        return Inbound(enabled=False, port=policy.inbound.port)
    return dataclasses.replace(policy.inbound, include_ports=ports, exclude_ports=())


def ports_of_containers(policy: Policy) -> tuple[int, ...]:
    """The TCP ports of the data plane that containers' connections are redirected to."""
    if not policy.virtual_networks:
        return ()
    return (policy.outbound.port, *((policy.dns.port,) if policy.dns.tcp else ()))


def _sees_arrivals(chain: Chain) -> bool:
    return chain.hook.hook != "output" if chain.hook else chain.name not in ("outbound", guard.GUARD_OWN)


def _purposes(policy: Policy, chooses_sockets: bool) -> Iterator[str]:
    if not chooses_sockets and policy.inbound.enabled:
        yield "inbound connections (this kernel has no sk_lookup programs)"
    if policy.virtual_networks:
        yield "virtual networks"
    if policy.drop_invalid:
        yield INVALID_PACKETS
    if _leaves_guard(policy, chooses_sockets):
        yield GUARD


@contextmanager
def put(wanted: Companion | None) -> Iterator[None]:
    """Put the table in place before the block, or take it away after it; as it was before when the block fails.

    Raises HostError when nf_tables does not work here, ApplyError when it refuses; nothing was changed then. Raises
    HalfDoneError when the block fails and the table cannot be put back.
    """
    engine = _engine(wanted)
    before = _text(engine) if engine else None
    if engine and wanted:
        engine.apply(engine.fitted(wanted.plan))
    try:
        yield
    except BaseException as error:
        memory.give_back()
        stays = _put_back(engine, before) if engine and wanted else ""
        if stays and isinstance(error, Exception):
            raise HalfDoneError(f"{described(error)}. {stays}") from error
        raise
    if engine and before is not None and not wanted:
        engine.remove(draining=False)


def _put_back(engine: NftablesEngine, before: str | None) -> str:
    """Make the table what it was; what cannot be done is handed back in words."""

    def lines() -> str:
        gone = f"delete table {TABLE}\n" if nft.held(engine.nft, TABLE) is not None else ""
        return gone + (before or "")

    failed = nft.taken_back(engine.nft, lines)
    if not failed:
        return ""
    return (
        f"Putting the table {TABLE} of nf_tables back failed too: {failed}. Run `tpctl uninstall`, then look at "
        "`tpctl status`"
    )


def _engine(wanted: Companion | None) -> NftablesEngine | None:
    try:
        way = nft.find()
        kernel = probe.require(way) if wanted else probe.COMPLETE
    except HostError as error:
        if wanted is None:
            return None  # without nf_tables there is no table of it
        raise HostError(
            f"{', '.join(wanted.purposes)}: the eBPF engine leaves that to nftables, and {error}"
        ) from error
    return NftablesEngine(way, EngineOptions(), TABLE, kernel=kernel)


def _text(engine: NftablesEngine) -> str | None:
    """What the table holds, as nft reads it; None when there is none."""
    try:
        return engine.nft.listing(f"list table {TABLE}") if nft.held(engine.nft, TABLE) is not None else None
    except NftError as refused:
        raise HostError(f"the table {TABLE} of nf_tables cannot be read: {refused}") from refused


def inspect(wanted: Companion | None) -> Inspection | None:
    """What the table holds, compared with what it should; None when there is none, and none should be."""
    engine = _engine(None)
    if engine is None:
        return None
    if wanted:
        with suppress(HostError):  # what does not work here is told as drift
            engine.kernel = probe.require(engine.nft)
    found = engine.inspect(engine.fitted(wanted.plan) if wanted else None)
    if not found.installed:
        return found._replace(drift=(f"-table {TABLE}",)) if wanted else None
    return found if wanted else found._replace(drift=(f"+table {TABLE}",))


def remove(*, dry_run: bool, draining: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take the table away; hands back what went, and notices. With `draining`, redirected connections may finish."""
    engine = _engine(None)
    held = engine.current() if engine else None
    if engine is None or held is None:
        return (), ()
    notices: tuple[str, ...] = ()
    if draining and not dry_run:
        running = NftablesEngine(engine.nft, EngineOptions()).hold(drain.redirected_ports(held))
        notices = (still_running(running),) if running else ()
    return engine.remove(dry_run=dry_run, draining=False).removed, notices
