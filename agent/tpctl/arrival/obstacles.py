"""Rules of others that act on redirected connections, and those that would not without the redirect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tpctl.arrival import journey, walk
from tpctl.arrival.journey import Trip, Way
from tpctl.arrival.owners import Owner, owner_of
from tpctl.arrival.packets import LOOPBACK, Matching, Packet
from tpctl.arrival.remedies import keeping, remedy
from tpctl.engines.foreign import ENDS, Hook, Place, Table, Verdict
from tpctl.spec.connection import Direction
from tpctl.spec.policy import Family, Protocol

CONNTRACK = -200
"""What comes before it, by priority, can keep a packet from it (NF_IP_PRI_CONNTRACK in linux/netfilter_ipv4.h)."""
_HINDERS = ENDS | {Verdict.UNTRACK, Verdict.MASQUERADE}
HIDES = "hides {} from conntrack, and so from every nat rule"
_BY_SOURCE = "the source address of {}, by which the data plane looks up its destination"
_VERBS = {
    Verdict.DROP: ("drops {}", "drop {}"),
    Verdict.REJECT: ("rejects {}", "reject {}"),
    Verdict.TRANSLATE: ("translates {}", "translate {}"),
    Verdict.UNTRACK: (HIDES, HIDES.replace("hides", "hide")),
    Verdict.MASQUERADE: (f"changes {_BY_SOURCE}", f"change {_BY_SOURCE}"),
    Verdict.MARK: ("marks, so that a rule of ip-rule(8) can re-route, {}", "mark, and so re-route, {}"),
}
"""What a rule does, and what it may do."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A rule or policy of somebody else's that acts on a packet of a connection."""

    place: Place
    verdict: Verdict
    extent: Matching
    """How many of the packets: ALL, SOME, or PERHAPS some."""
    packet: Packet

    @property
    def owner(self) -> Owner:
        """Whose it looks like."""
        return owner_of(self.place)

    @property
    def remedy(self) -> str | None:
        """What lets such packets pass; None where it ends nothing, or is a rule of tpctl's own, which means it."""
        if self.verdict not in _HINDERS or self.owner is Owner.TPCTL:
            return None
        return remedy(self.owner, self.place, self.packet)

    @property
    def does(self) -> str:
        """What the rule does to `packet`, in words, as in "may drop an answer of the data plane"."""
        certain, perhaps = _VERBS.get(self.verdict, ("acts on {}", "act on {}"))
        said = certain if self.extent is Matching.ALL else f"may {perhaps}"
        return said.format(self.packet.what)


def advice(found: Obstacle) -> str | None:
    """The command, and how to keep it."""
    kept = keeping(found.owner, found.place)
    return f"{found.remedy}{f' ({kept})' if kept else ''}" if found.remedy else None


def on_the_way(tables: Sequence[Table], trip: Trip, *, with_nat: bool = True) -> tuple[Obstacle, ...]:
    """Everything that acts on the packets of a connection, in their order. Pure."""
    found = (
        Obstacle(stop.place, stop.verdict, stop.extent, packet)
        for packet in journey.packets(trip)
        for stop in walk.stops(tables, packet, with_nat=with_nat)
        if stop.verdict is not Verdict.ACCEPT and _MATTERS.get(stop.verdict, _always)(trip, packet, stop)
    )
    return tuple(found)


def _always(trip: Trip, packet: Packet, stop: walk.Stop) -> bool:
    return True


def _another_source_matters(trip: Trip, packet: Packet, stop: walk.Stop) -> bool:
    """Whether it matters that a packet gets another source: the eBPF engine knows its connections over lo by that.

    What leaves for ::1 by lo is masqueraded as ::1 (nf_nat_masquerade_ipv6() in net/netfilter/nf_nat_masquerade.c).
    """
    stays = (
        packet.family is Family.IPV6 and stop.place.rule is not None and "masquerade" in stop.place.rule.text.lower()
    )
    return not stays and (
        trip.redirected_to is not None
        and trip.way is Way.SOCKETS
        and trip.direction is Direction.OUTBOUND
        and trip.protocol == Protocol.TCP
        and packet.hook is Hook.POSTROUTING
        and not packet.is_reply
    )


def _tracking_matters(trip: Trip, packet: Packet, stop: walk.Stop) -> bool:
    """Whether it matters that a packet is not tracked: it would be translated, and conntrack does not know it yet.

    It knows what comes over lo from the hook output.
    """
    return (
        trip.redirected_to is not None
        and trip.way is Way.NAT
        and stop.place.base.priority < CONNTRACK
        and packet.priorities[0] < CONNTRACK
        and packet.hook in (Hook.PREROUTING, Hook.OUTPUT)
        and not (packet.hook is Hook.PREROUTING and packet.in_interface == LOOPBACK)
    )


_MATTERS = {Verdict.UNTRACK: _tracking_matters, Verdict.MASQUERADE: _another_source_matters}


def brought_about(tables: Sequence[Table], trips: Iterable[Trip]) -> tuple[Obstacle, ...]:
    """What certainly ends more connections with the redirect than without it, each place once. Pure.

    One of both families is told twice where the remedy is another.
    """
    found: dict[tuple[str, str | None], Obstacle] = {}
    for trip in trips:
        for obstacle in _worsened(tables, trip):
            found.setdefault((obstacle.place.text, obstacle.remedy), obstacle)
    return tuple(found.values())


def _worsened(tables: Sequence[Table], trip: Trip) -> Iterator[Obstacle]:
    without = {
        key: {stop.place.text: stop.extent for stop in walk.stops(tables, packet, with_nat=False)}
        for key, packet in journey.counterparts(trip).items()
    }
    for obstacle in on_the_way(tables, trip, with_nat=False):
        if obstacle.verdict not in ENDS or obstacle.extent < Matching.SOME:
            continue
        before = without.get((obstacle.packet.hook, obstacle.packet.is_reply), {})
        if obstacle.extent > before.get(obstacle.place.text, Matching.NEVER):
            yield obstacle
