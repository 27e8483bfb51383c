"""What a host has beside tpctl's rules that can send a connection elsewhere, whatever the connection: one list.

Routing rules, the reverse path filter and the nat chains of others. Which of their rules meet a connection, `obstacles`
tells. Reads, and changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

from tpctl.arrival.journey import Trip, Way
from tpctl.arrival.packets import LOOPBACK
from tpctl.engines import precedence
from tpctl.engines.base import ROUTE_MARK
from tpctl.engines.foreign import Chain, Hook, Table, base_chains
from tpctl.host import routes, rules
from tpctl.rehearsal.sockets import AF
from tpctl.spec.connection import Direction
from tpctl.spec.policy import Family, Policy

_MOST_RULES = 12
_OWN = f"fwmark {ROUTE_MARK:#x}/{ROUTE_MARK:#x} "
"""What the rule has that `tpctl.change.routing` adds."""
_IPV4_SETTINGS = Path("/proc/sys/net/ipv4/conf")
_MAIN = 254
_BEYOND = {Family.IPV4: ip_address("198.51.100.1"), Family.IPV6: ip_address("2001:db8::1")}
"""Stand for everybody elsewhere: addresses for documentation (RFC 5737, RFC 3849)."""
_FILTERS = {0: "off", 1: "strict", 2: "loose"}
"""net.ipv4.conf.*.rp_filter, Documentation/networking/ip-sysctl.rst."""


def listing(policy: Policy, trip: Trip, engine: str, tables: Sequence[Table]) -> Iterator[str]:
    """A line each, for the family and the hooks of a connection."""
    yield from _routing(trip.family)
    if trip.family is Family.IPV4:
        yield from _reverse_path(trip)
    yield from _translating(policy, trip, engine, tables)


def _routing(family: Family) -> Iterator[str]:
    """Rules that select by mark can re-route what a rule of mangle has marked, at the hook output and for answers."""
    found: tuple[str, ...] = ()
    with contextlib.suppress(OSError):
        found = tuple(one for one in rules.listed(family) if _OWN not in one)
    command = "ip rule" if family is Family.IPV4 else "ip -6 rule"
    for one in found[:_MOST_RULES]:
        yield f"routing may differ from the main table: {command} {one}"
    if len(found) > _MOST_RULES:
        yield f"and by {len(found) - _MOST_RULES} more of {command}"


def _reverse_path(trip: Trip) -> Iterator[str]:
    """The filter of each interface by which a packet of the connection, or an answer, arrives."""
    names = [trip.interface] if trip.interface else []
    if trip.direction is Direction.OUTBOUND and trip.redirected_to is not None:
        names = [LOOPBACK]  # both ways
    for name in names:
        value = reverse_path_filter(name)
        if value is None:
            continue
        said = f"reverse path filter of {name}: {_FILTERS.get(value, value)} (rp_filter {value})"
        if value == 1 and trip.direction is Direction.INBOUND and trip.sources:
            said += _expected(trip, name)
        yield said


def _expected(trip: Trip, name: str) -> str:
    with contextlib.suppress(OSError):
        route = routes.route_to(trip.sources[0].packed)
        way = routes.interface_name(route.interface) if route else None
        if way != name:
            return f"; it drops the connection, because the route to {trip.sources[0]} is by {way or 'no interface'}"
    return ""


def reverse_path_filter(interface: str) -> int | None:
    """What counts for what arrives by an interface, the higher of two settings; None where the kernel tells none."""
    try:
        return max(int((_IPV4_SETTINGS / each / "rp_filter").read_text()) for each in ("all", interface))
    except (OSError, ValueError):
        return None


def way_of_answers(family: Family) -> str | None:
    """Why answers to clients beyond this host's own links do not leave where such clients come from; None if they do.

    VPN clients that take all traffic do that (wg-quick, ip-rule(8)), with or without a redirect. A client of the own
    link, as the probes are, is answered all the same.
    """
    try:
        defaults = [one for one in routes.of_table(AF[family], _MAIN) if not one.prefix_length and one.interface]
        route = routes.route_to(_BEYOND[family].packed)
    except OSError:
        return None
    if not defaults or route is None or route.interface in {one.interface for one in defaults}:
        return None
    usual = routes.interface_name(min(defaults, key=lambda one: one.metric).interface)
    return f"answers to them leave by {routes.interface_name(route.interface)} and not by {usual} (ip-rule(8))"


def _translating(policy: Policy, trip: Trip, engine: str, tables: Sequence[Table]) -> Iterator[str]:
    hook = Hook.OUTPUT if trip.direction is Direction.OUTBOUND else Hook.PREROUTING
    ours = precedence.priority(policy, trip.family, engine, hook.upper())
    for table, chain in base_chains(tables, hook, trip.family):
        if chain.kind == "nat" and chain.rules:
            where = f"{table.program if table.is_iptables else table.family} {table.name} {chain.name}"
            rules_of = "1 rule" if len(chain.rules) == 1 else f"{len(chain.rules)} rules"
            yield f"nat chain {where} ({rules_of}, priority {chain.priority}) {_order(trip, chain, ours)}"


def _order(trip: Trip, chain: Chain, ours: int) -> str:
    if trip.way is Way.SOCKETS:
        outbound = trip.direction is Direction.OUTBOUND
        return "is asked after tpctl's programs" if outbound else "is asked before tpctl's programs"
    if chain.priority == ours:
        return "is the one in which tpctl's rules are, or has their priority: `tpctl status` tells the order"
    return f"is asked {'before' if chain.priority < ours else 'after'} tpctl's rules (priority {ours})"
