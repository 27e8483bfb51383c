"""Connections that run through the data plane when the redirection is removed may finish.

When the last user of NAT goes, the kernel drops its NAT and conntrack hooks, and redirected connections are reset. So
an empty table stays until they have ended (agent.engines.nftables.drain); any later command takes it away. The same
holds for connections that the data plane has dialled from its clients' addresses: a table that marks the answers stays,
with the rule and route of `agent.routing`. And for those it has dialled from ::6: the address stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from agent import loopback, routing
from agent.engines.base import Engine, Footprint, Removal
from agent.engines.nftables import drain, nft
from agent.engines.nftables.engine import NftablesEngine, load, still_running
from agent.engines.nftables.nft import Nft, NftError
from agent.errors import ApplyError, HostError
from agent.policy import Policy


def remove(engine: Engine[Any], footprint: Footprint | None, *, dry_run: bool = False) -> Removal:
    """Take an engine's rules away and let the connections finish that they redirect."""
    holds = engine.name == "iptables" and not dry_run
    notices = hold(engine.inspect(None).redirected_ports) if holds else ()
    removal = engine.remove(dry_run=dry_run, footprint=footprint)
    return replace(removal, notices=(*notices, *removal.notices))


def remove_others(engine: Engine[Any], engines: Iterable[Engine[Any]], footprints: Mapping[str, Footprint]) -> Removal:
    """Take away what others of `engines`, or kumactl through them, have installed: the rules of `engine` are in place.

    Connections that were redirected go on. New rules with NAT see to that by being there; eBPF programs
    translate nothing, so then the same has to stay as after an uninstall.
    """
    replaced: list[str] = []
    notices: list[str] = []
    for other in engines:
        if other.name == engine.name:
            continue
        footprint = footprints.get(other.name)
        if engine.name == "ebpf":
            removal = remove(other, footprint)
        else:
            removal = other.remove(footprint=footprint, draining=False)
        notices += removal.notices
        if removal.removed:
            replaced.append(f"the rules of the {other.name} engine")
    return Removal(tuple(replaced), tuple(notices))


def hold(ports: Collection[int]) -> tuple[str, ...]:
    """Before iptables rules go: let the connections they redirect to `ports` finish. Hands back notices."""
    engine = _engine() if ports else None
    running = engine.hold(ports) if engine else 0
    return (still_running(running),) if running else ()


def tidy() -> int:
    """Remove what an earlier uninstall left, if nothing needs it any more; hands back how many connections still do."""
    engine = _engine()
    return (engine.drain_leftovers() or 0) if engine else 0


def hold_answers(policy: Policy | None) -> None:
    """Before the rules of `--inbound-mode tproxy` go: let connections that are dialled from clients' addresses finish.

    `policy` is the one that goes, if it is known.
    """
    way = _way()
    if way is None or _held(way):
        return
    try:
        way.execute(drain.answers_leftover(policy))
    except NftError as refused:
        raise ApplyError(f"nf_tables refused the table {drain.ANSWERS_TABLE}: {refused}") from refused


def release_answers() -> None:
    """Remove the table that `hold_answers` left: an installation does its work."""
    way = _way()
    if way and _held(way):
        _delete(way)


def tidy_answers(*, dry_run: bool = False) -> tuple[int, tuple[str, ...]]:
    """Once the rules are gone: remove what `hold_answers` left, and `agent.routing`, unless connections need them.

    Hands back how many do, and what was removed, or would be.
    """
    way = _way()
    held = way is not None and _held(way)
    running = drain.dialled() if held else 0
    if running:
        return running, ()
    if held and way and not dry_run:
        _delete(way)
    return 0, routing.remove(dry_run=dry_run)


def dialled_run(count: int) -> str:
    """What the operator is told about connections that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} from the data plane to applications in the name of clients, and may finish: until then "
        f"the table {drain.ANSWERS_TABLE} and the routing table {routing.TABLE} stay; `tpctl status` removes them "
        "after that"
    )


def tidy_address(interface: str, *, dry_run: bool = False) -> tuple[int, bool]:
    """Once nothing needs ::6 any more: remove it, unless connections run from it.

    Hands back how many do, and whether it was removed, or would be.
    """
    if not loopback.present(interface):
        return 0, False
    running = loopback.connections()
    return running, not running and loopback.remove(interface, dry_run=dry_run)


def address_runs(count: int, interface: str) -> str:
    """What the operator is told about connections from ::6 that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} from ::6 to applications, and may finish: until then the address stays on {interface}; "
        "`tpctl status` removes it after that"
    )


def _held(way: Nft) -> bool:
    try:
        return nft.held(way, drain.ANSWERS_TABLE) is not None
    except NftError:
        return False


def _delete(way: Nft) -> None:
    try:
        way.execute(f"delete table {drain.ANSWERS_TABLE}\n")
    except NftError as refused:
        raise ApplyError(f"nf_tables refused to remove table {drain.ANSWERS_TABLE}: {refused}") from refused


def _way() -> Nft | None:
    try:
        return nft.find()
    except HostError:
        return None


def _engine() -> NftablesEngine | None:
    try:
        return load()
    except HostError:
        return None  # without nf_tables nothing can be left, nor was it
