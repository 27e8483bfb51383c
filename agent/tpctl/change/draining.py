"""Connections that run through the data plane when the redirection is removed may finish.

When the last user of NAT goes, the kernel drops its NAT and conntrack hooks, and redirected connections are reset. So
an empty table stays until they have ended (tpctl.engines.leftovers). The same holds for connections that the data
plane has dialled from its clients' addresses: a table that marks the answers stays, with the rule and route of
`tpctl.change.routing`. And for those it has dialled from ::6: the address stays. `tpctl.change.finishing` waits for
their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tpctl.change import device_routes, loopback, routing
from tpctl.engines import leftovers
from tpctl.engines.base import Engine, Footprint, Removal
from tpctl.spec.policy import Family, Policy


def remove(engine: Engine[Any], footprint: Footprint | None, *, dry_run: bool = False) -> Removal:
    """Take an engine's rules away and let the connections finish that they redirect."""
    holds = engine.name == "iptables" and not dry_run
    notices = leftovers.hold(engine.inspect(None).redirected_ports) if holds else ()
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


def waiting(policy: Policy | None) -> int:
    """How many connections run for which something stays that `policy`, if one is installed, does not need itself.

    A quick look, that takes nothing away.
    """
    running = leftovers.redirected() + leftovers.answered()
    name = policy.loopback if policy else "lo"
    if not (policy and Family.IPV6 in policy.families) and loopback.owner(name) == loopback.OURS:
        running += loopback.connections()
    return running


def tidy_answers(*, dry_run: bool = False) -> tuple[int, tuple[str, ...]]:
    """Once the rules are gone: remove the table of answers, and what `routing` left, unless connections need it.

    Hands back how many do, and what was removed, or would be.
    """
    if running := leftovers.answered():
        return running, ()
    if not dry_run:
        leftovers.release_answers()
    return 0, routing.remove(dry_run=dry_run)


def tidy_device_routes(*, dry_run: bool = False) -> tuple[int, tuple[str, ...]]:
    """Once the rules are gone: remove `device_routes`, unless redirected connections run, which may be bound sockets'.

    Hands back how many do, and what was removed, or would be.
    """
    if not device_routes.is_present():
        return 0, ()
    running = leftovers.redirected()
    return (running, ()) if running else (0, device_routes.remove(dry_run=dry_run))


def dialled_run(count: int) -> str:
    """What the operator is told about connections that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} from the data plane to applications in the name of clients, and may finish: until then "
        f"the table {leftovers.ANSWERS_TABLE} and the routing table {routing.TABLE} stay, and go after that"
    )


def came_with_kumactl(interface: str, engines: Iterable[Engine[Any]]) -> bool:
    """Whether ::6 on the interface is not ours, and rules of kumactl's are there that want it."""
    if loopback.owner(interface) != loopback.OTHERS:
        return False
    return any(Family.IPV6 in engine.inspect(None).foreign_families for engine in engines)


def tidy_address(interface: str, *, is_kumactls: bool = False, dry_run: bool = False) -> tuple[int, bool]:
    """Once nothing needs ::6 any more: remove it if it is ours, unless connections run from it.

    Hands back how many do, and whether it was removed, or would be: `is_kumactls` says that it would be ours by then.
    """
    if loopback.owner(interface) != loopback.OURS and not (is_kumactls and dry_run):
        return 0, False
    running = loopback.connections()
    return running, not running and (dry_run or loopback.remove(interface))


def address_runs(count: int, interface: str) -> str:
    """What the operator is told about connections from ::6 that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} from ::6 to applications, and may finish: until then the address stays on {interface}, "
        "and goes after that"
    )
