"""What eBPF programs cannot do is done by nf_tables beside them, in a table of its own.

Packets that are forwarded for a container meet no socket of this host, nothing but conntrack knows which packet is
invalid, and before Linux 5.9 no program chooses the socket of a connection that arrives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from agent.engine_options import EngineOptions
from agent.engines.base import Inspection
from agent.engines.nftables import drain, nft, probe
from agent.engines.nftables.engine import NftablesEngine, NftablesPlan, still_running
from agent.engines.nftables.nft import NftError
from agent.engines.nftables.ruleset import table_for
from agent.engines.nftables.table import FAMILY, NAME, Chain
from agent.errors import HostError
from agent.policy import Dns, Inbound, Outbound, Policy, PortRange
from agent.ssh_guard import captures

TABLE = f"{FAMILY} {NAME}_ebpf"
INVALID_PACKETS = "invalid packets"


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
    return Companion(
        tuple(_purposes(policy, chooses_sockets)),
        NftablesPlan(dataclasses.replace(table, chains=chains, where=TABLE), comments),
    )


def _left_to_nftables(policy: Policy, chooses_sockets: bool) -> Policy | None:
    inbound = _ports_of_containers(policy) if chooses_sockets else policy.inbound
    if not (inbound.enabled or policy.virtual_networks or policy.drop_invalid):
        return None
    return dataclasses.replace(
        policy,
        inbound=inbound,
        outbound=Outbound(enabled=False, port=policy.outbound.port),
        dns=Dns(port=policy.dns.port, tcp=policy.dns.tcp),
        cgroup=None,
    )


def _ports_of_containers(policy: Policy) -> Inbound:
    """What arrives for the ports containers are redirected to.

    The programs cannot tell a container's redirected connection from one that another host opened to such a port, so
    they leave both alone, and the latter is redirected here.
    """
    if not policy.virtual_networks:
        return Inbound(enabled=False)
    ports = tuple(PortRange(port) for port in ports_of_containers(policy) if captures(policy.inbound, port))
    if not ports:
        return Inbound(enabled=False)
    return dataclasses.replace(policy.inbound, include_ports=ports, exclude_ports=())


def ports_of_containers(policy: Policy) -> tuple[int, ...]:
    """The TCP ports of the data plane that containers' connections are redirected to."""
    if not policy.virtual_networks:
        return ()
    return (policy.outbound.port, *((policy.dns.port,) if policy.dns.tcp else ()))


def _sees_arrivals(chain: Chain) -> bool:
    return chain.hook.hook != "output" if chain.hook else chain.name != "outbound"


def _purposes(policy: Policy, chooses_sockets: bool) -> Iterator[str]:
    if not chooses_sockets and policy.inbound.enabled:
        yield "connections that arrive (this kernel has no sk_lookup programs)"
    if policy.virtual_networks:
        yield "virtual networks"
    if policy.drop_invalid:
        yield INVALID_PACKETS


@contextmanager
def put(wanted: Companion | None) -> Iterator[None]:
    """Put the table in place before the block, or take it away after it; as it was before when the block fails.

    Raises HostError when nf_tables does not work here, ApplyError when it refuses; nothing was changed then.
    """
    engine = _engine(wanted)
    before = _text(engine) if engine else None
    if engine and wanted:
        engine.apply(wanted.plan)
    try:
        yield
    except BaseException:
        if engine and wanted:
            with suppress(NftError):  # why the block failed is what the user has to know
                engine.nft.execute(f"delete table {TABLE}\n{before or ''}")
        raise
    if engine and before is not None and not wanted:
        engine.remove(draining=False)


def _engine(wanted: Companion | None) -> NftablesEngine | None:
    try:
        way = nft.find()
        if wanted:
            probe.require(way)
    except HostError as error:
        if wanted is None:
            return None  # without nf_tables there is no table of it
        raise HostError(
            f"{', '.join(wanted.purposes)}: the eBPF engine leaves that to nftables, and {error}"
        ) from error
    return NftablesEngine(way, EngineOptions(), TABLE)


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
    found = engine.inspect(wanted.plan if wanted else None)
    if not found.installed:
        return dataclasses.replace(found, drift=(f"-table {TABLE}",)) if wanted else None
    return found if wanted else dataclasses.replace(found, drift=(f"+table {TABLE}",))


def remove(*, dry_run: bool, draining: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take the table away; hands back what went, and notices. With `draining`, redirected connections may finish."""
    engine = _engine(None)
    held = nft.held(engine.nft, TABLE) if engine else None
    if engine is None or held is None:
        return (), ()
    notices: tuple[str, ...] = ()
    if draining and not dry_run:
        running = NftablesEngine(engine.nft, EngineOptions()).hold(drain.redirected_ports(held))
        notices = (still_running(running),) if running else ()
    return engine.remove(dry_run=dry_run, draining=False).removed, notices
