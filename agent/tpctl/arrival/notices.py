"""What stands beside tpctl on this host, in words: for install, status and explain. Reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tpctl.arrival import bans, beside, obstacles, untracked
from tpctl.arrival.journey import Trip, Way, of_connection
from tpctl.arrival.obstacles import Obstacle, advice
from tpctl.arrival.owners import Owner, owner_of
from tpctl.arrival.packets import Matching
from tpctl.engines import foreign_tables
from tpctl.engines.foreign import Place, Table, Verdict
from tpctl.host import interfaces, routes
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.policy import DNS_PORT, Address, Family, Policy, Protocol
from tpctl.spec.verdict import Verdict as Decision

_MOST_INTERFACES = 16
"""A host of containers has thousands, which look the same to its filters."""
_MOST_SHOWN = 5


def problems(policy: Policy, engine: str, tables: tuple[Table, ...] | None = None) -> tuple[str, ...]:
    """What certainly ends connections because they are redirected, a line each. `tables` if they were read already."""
    tables = foreign_tables.foreign_tables() if tables is None else tables
    kinds = [*trips(policy, engine)]
    found = obstacles.brought_about(tables, kinds)
    return (
        *(_problem(one) for one in found[:_MOST_SHOWN]),
        *_unlike(tables, kinds),
        *untracked.problems(tables, policy, engine, kinds, routes.is_local),
    )


def _unlike(tables: tuple[Table, ...], kinds: Iterable[Trip]) -> Iterator[str]:
    """Rules that give another source to what the eBPF engine knows by its source, a line each."""
    changing = [
        table
        for table in tables
        if any(rule.verdict is Verdict.MASQUERADE for chain in table.chains.values() for rule in chain.rules)
    ]
    found: dict[str, Obstacle] = {}
    for trip in kinds if changing else ():
        for one in obstacles.on_the_way(changing, trip):
            if one.verdict is Verdict.MASQUERADE and one.extent >= Matching.SOME:
                found.setdefault(one.place.text, one)
    for one in found.values():
        yield (
            "a rule changes the source address of connections over lo, by which the data plane looks up their "
            f"destination, so it cannot serve them: {one.place.text}; name the interface in it (-o eth0), or exempt "
            f"them first: {advice(one)}"
        )


def bypasses(policy: Policy, engine: str, tables: tuple[Table, ...] | None = None) -> tuple[str, ...]:
    """Filters on an application's port that the redirect leads past, a line each; eBPF leaves packets as they are."""
    if engine == "ebpf":
        return ()
    tables = foreign_tables.foreign_tables() if tables is None else tables
    arriving = [trip for trip in trips(policy, engine) if trip.direction is Direction.INBOUND and not trip.is_forwarded]
    found: dict[Owner, list[Place]] = {}
    for place in (*bans.bypassed(tables, policy), *bans.loosened(tables, arriving)):
        mine = found.setdefault(owner_of(place), [])
        if place.text not in [one.text for one in mine]:
            mine.append(place)
    return tuple(_bypass(owner, places, policy) for owner, places in found.items())


def trips(policy: Policy, engine: str) -> Iterator[Trip]:
    """Every kind of connection that a policy redirects, on each interface of this host."""
    sockets = engine == "ebpf"
    own = Way.SOCKETS if sockets else Way.NAT
    taken = Way.SOCKETS if sockets else Way.TPROXY if policy.inbound.is_transparent else Way.NAT
    for family in sorted(policy.families):
        for name, mine in [*_redirected(policy, family)][:_MOST_INTERFACES]:
            if policy.outbound.enabled:
                yield Trip(
                    Direction.OUTBOUND, family, Protocol.TCP, name, sources=mine, proxy_uid=policy.proxy_uid,
                    redirected_to=policy.outbound.port, way=own,
                )  # fmt: skip
            if policy.captures_dns(family):
                yield Trip(
                    Direction.OUTBOUND, family, Protocol.UDP, name, DNS_PORT, mine, proxy_uid=policy.proxy_uid,
                    redirected_to=policy.dns.port, way=own,
                )  # fmt: skip
            if policy.inbound.enabled:
                yield Trip(
                    Direction.INBOUND, family, Protocol.TCP, name, destinations=mine, proxy_uid=policy.proxy_uid,
                    redirected_to=policy.inbound.port, way=taken,
                )  # fmt: skip
        yield from _of_virtual_networks(policy, family)


def _redirected(policy: Policy, family: Family) -> Iterator[tuple[str, tuple[Address, ...]]]:
    """The interfaces whose connections are redirected, with their addresses."""
    held: dict[str, list[Address]] = {}
    for one in interfaces.addresses():
        if one.address.version == family and one.interface != policy.loopback and not policy.excludes(one.interface):
            held.setdefault(one.interface, []).append(one.address)
    return ((name, tuple(mine)) for name, mine in held.items())


def _of_virtual_networks(policy: Policy, family: Family) -> Iterator[Trip]:
    for vnet in policy.networks(family):
        name = vnet.interface.replace("+", "0")
        for protocol, port, to in (
            (Protocol.TCP, None, policy.outbound.port),
            (Protocol.UDP, DNS_PORT, policy.dns.port),
        ):
            yield Trip(
                Direction.INBOUND, family, protocol, name, port, proxy_uid=policy.proxy_uid, redirected_to=to,
                is_forwarded=True,
            )  # fmt: skip


def _problem(found: Obstacle) -> str:
    packet = found.packet
    many = "some redirected connections" if found.extent is Matching.SOME else "redirected connections"
    verb = "drops" if found.verdict is Verdict.DROP else "rejects"
    owner = "a rule" if found.owner is Owner.ADMINISTRATOR else f"a rule of {found.owner}"
    where = f" at port {packet.destination_port}" if packet.destination_port and not packet.is_reply else ""
    what = f"answers of {many}" if packet.is_reply else f"{many}{where}"
    return f"{owner} drops {what}: {found.place.text}; to let them pass: {advice(found)}".replace("drops", verb, 1)


def _bypass(owner: Owner, places: Sequence[Place], policy: Policy) -> str:
    whose = "this host's firewall" if owner is Owner.ADMINISTRATOR else str(owner)
    rest = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return (
        f"{whose} does not refuse redirected connections by this rule, because it is asked after the redirect, about "
        f"port {policy.inbound.port}: {places[0].text}{rest}; docs/security.md tells how to write it so that it still "
        "holds (for every port, by the original port, or before the redirect), and --inbound-mode tproxy or --engine "
        "ebpf leave the port as it is"
    )


def on_this_host(policy: Policy, connection: Connection, decision: Decision, engine: str) -> tuple[str, ...]:
    """What stands beside a connection's way on this host, a line each.

    First the rules that drop, mark or translate it, then what could send it elsewhere.
    """
    tables = foreign_tables.foreign_tables()
    trip = of_connection(connection, decision, engine, policy.proxy_uid)
    meeting = tuple(dict.fromkeys(_stands(one) for one in obstacles.on_the_way(tables, trip)))
    found = meeting or ("no rule of other software drops, rejects, translates or marks it",)
    return (*found, *beside.listing(policy, trip, engine, tables))


def _stands(found: Obstacle) -> str:
    owner = "" if found.owner is Owner.ADMINISTRATOR else f" ({found.owner})"
    said = f"{found.place.text}{owner} {found.does} at {found.packet.hook}"
    return f"{said}; to let it pass: {advice(found)}" if found.remedy else said
