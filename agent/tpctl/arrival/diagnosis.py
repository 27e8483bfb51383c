"""Where lost probes were lost.

They are sent once more while they are watched: rules of nf_tables, iptables-nft's among them, are traced; rules of
iptables' legacy variant are told by what they count; and drops by the kernel itself by its reasons, or its counters.
Where none of that tells anything, rules that would certainly take the packet are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tpctl.arrival import journey, kernel_drops, obstacles
from tpctl.arrival.drop_reasons import Drop, DropReasons, NoReasonsError
from tpctl.arrival.model import Again, Fate, Finding, Probe
from tpctl.arrival.obstacles import Obstacle, advice
from tpctl.arrival.owners import Owner
from tpctl.arrival.packets import LOOPBACK, Matching
from tpctl.arrival.tracing import Event, NoTraceError, Trace
from tpctl.engines import foreign_tables, presence
from tpctl.engines.foreign import ENDS, Place, Table, Verdict
from tpctl.record import state
from tpctl.spec.policy import Address, Family


def diagnose(lost: Sequence[Probe], again: Again) -> tuple[Finding | None, ...]:
    """What can be found out about each probe, in their order; None where nothing was, or it arrives now.

    Called in the host's network namespace while the probes' devices stand. It sends all `again`, once, under whatever
    observation it sets up, and takes that away before it returns. Raises nothing.
    """
    record = state.load()
    engine, proxy_uid = (record.options.engine, record.policy.proxy_uid) if record else ("", 0)
    watch = _Watch(lost, again)
    tables: Sequence[Table] | None = None
    found: list[Finding | None] = []
    for probe, outcome in watch.sent:
        if outcome.fate is Fate.ARRIVED:
            found.append(None)
            continue
        diagnosis = _Diagnosis(probe, engine, proxy_uid, watch)
        seen = diagnosis.watched()
        if seen is None:
            tables = foreign_tables.foreign_tables() if tables is None else tables
            seen = diagnosis.foreseen(tables)
        found.append(seen)
    return tuple(found)


def why_passed_by(probe: Probe) -> Finding | None:
    """A rule that keeps a connection from being translated, by what it says."""
    record = state.load()
    if record is None:
        return None
    trip = journey.of_connection(probe.connection, probe.expected, record.options.engine, record.policy.proxy_uid)
    found = obstacles.on_the_way(foreign_tables.foreign_tables(), trip, with_nat=False)
    return next((_finding(one) for one in found if one.verdict is Verdict.UNTRACK and one.extent is Matching.ALL), None)


class _Watch:
    """What was seen while the probes were sent once more."""

    def __init__(self, lost: Sequence[Probe], again: Again) -> None:
        self.legacy_before = foreign_tables.legacy_tables()
        self.counted_before = kernel_drops.read()
        self.events: list[Event] = []
        self.drops: tuple[Drop, ...] = ()
        with contextlib.ExitStack() as stack:
            traces = [*_traces(lost, stack)]
            reasons = None
            with contextlib.suppress(NoReasonsError):
                reasons = stack.enter_context(DropReasons())
            self.sent = again(lost)
            for trace in traces:
                self.events += trace.events()
            self.drops = reasons.read() if reasons else ()
        self.counted_after = kernel_drops.read()
        self.legacy_after = foreign_tables.legacy_tables() if self.legacy_before else ()
        self.place_of = functools.cache(foreign_tables.place_of)


def _traces(lost: Sequence[Probe], stack: contextlib.ExitStack) -> Iterator[Trace]:
    for family in sorted({probe.family for probe in lost}):
        mine = (_addresses(probe) for probe in lost if probe.family is family)
        with contextlib.suppress(NoTraceError):
            yield stack.enter_context(Trace(family, dict.fromkeys(itertools.chain.from_iterable(mine))))


class _Diagnosis:
    """One probe as it was sent once more, and what was seen meanwhile."""

    def __init__(self, probe: Probe, engine: str, proxy_uid: int, watch: _Watch) -> None:
        self.probe = probe
        self.trip = journey.of_connection(probe.connection, probe.expected, engine, proxy_uid)
        self.watch = watch

    def foreseen(self, tables: Sequence[Table]) -> Finding | None:
        """A rule that certainly takes the packet, or keeps it from being translated, by what it says."""
        found = obstacles.on_the_way(tables, self.trip, with_nat=False)
        likely = (one for one in found if one.verdict in ENDS | {Verdict.UNTRACK})
        return next((_finding(one) for one in likely if one.extent is Matching.ALL), None)

    def watched(self) -> Finding | None:
        """What took it."""
        watch = self.watch
        own = [event for event in watch.events if self._is_mine(event)]
        return (
            self._traced(own)
            or self._counted(watch.legacy_before, watch.legacy_after)
            or self._astray(own)
            or kernel_drops.by_reason(watch.drops, self.probe)
            or kernel_drops.by_counters(watch.counted_before, watch.counted_after, self.probe)
        )

    def _is_mine(self, event: Event) -> bool:
        return event.version == int(self.probe.family) and (self.probe.connection.source_port or 0) in event.ports

    def _traced(self, events: Sequence[Event]) -> Finding | None:
        for at, event in enumerate(events):
            if event.is_drop:
                place = self.watch.place_of(event.family, event.table, event.chain, event.handle)
                if place is not None:
                    return self._at(dataclasses.replace(place, path=_path(events[: at + 1])), event)
        return None

    def _at(self, place: Place, event: Event) -> Finding:
        is_reply = event.ports[1] == self.trip.source_port
        base = place.base
        likely = [
            packet
            for packet in journey.packets(self.trip)
            if packet.hook is base.hook
            and packet.is_reply == is_reply
            and packet.priorities[0] <= base.priority <= packet.priorities[1]
        ]
        verdict = place.rule.verdict if place.rule and place.rule.verdict in ENDS else Verdict.DROP
        if not likely:
            return Finding(f"{place.text} takes it", str(Owner.ADMINISTRATOR))
        return _finding(Obstacle(place, verdict, Matching.ALL, likely[0]))

    def _counted(self, before: Iterable[Table], after: Sequence[Table]) -> Finding | None:
        """The first rule of the legacy variant that may match, ends it, and has counted meanwhile."""
        counts = _counts(before)
        for one in obstacles.on_the_way(after, self.trip, with_nat=False):
            if one.verdict in ENDS and _count(one.place) > counts.get(_key(one.place), 0):
                return _finding(dataclasses.replace(one, extent=Matching.ALL))  # it has counted: no "may"
        return None

    def _astray(self, events: Sequence[Event]) -> Finding | None:
        """It, or its answer, leaves this host by an interface that does not lead to the other end."""
        expected = {LOOPBACK, self.probe.connection.interface}
        for event in events:
            if event.chain == "postrouting" and event.table.startswith(presence.TRACE_TABLE):
                name = _interface(event.out_interface)
                if name and name not in expected:
                    return self._leaving(name, is_answer=event.ports[1] == self.trip.source_port)
        return None

    def _leaving(self, name: str, *, is_answer: bool) -> Finding:
        what = "its answer" if is_answer else "it"
        command = "ip rule" if self.probe.family is Family.IPV4 else "ip -6 rule"
        return Finding(
            f"{what} leaves by {name}: a rule of ip-rule(8) sends it there, perhaps by a mark that a filter sets",
            None,
            f"{command} add to {_far(self.probe)} lookup main priority 1",
        )


def _finding(found: Obstacle) -> Finding:
    return Finding(f"{found.place.text} {found.does}", str(found.owner), advice(found))


def _addresses(probe: Probe) -> tuple[Address, ...]:
    """Of the probe's two ends those that are not everybody's; either sees the packets of both directions."""
    ends = (probe.connection.source, probe.connection.destination)
    return tuple(dict.fromkeys(end for end in ends if not end.is_loopback)) or ends[1:]


def _far(probe: Probe) -> Address:
    connection = probe.connection
    return connection.source if connection.direction == "inbound" else connection.destination


def _path(events: Sequence[Event]) -> tuple[str, ...]:
    """The chains from the base chain to that of the last event."""
    last = events[-1]
    path: list[str] = []
    for event in events:
        if (event.packet, event.family, event.table) != (last.packet, last.family, last.table):
            continue
        if event.chain not in path:
            path = [event.chain]  # another base chain of the table
        del path[path.index(event.chain) + 1 :]
        if event.is_call and event is not last:
            path.append(event.called)
    return tuple(path)


def _counts(tables: Iterable[Table]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for table in tables:
        for chain in table.chains.values():
            for rule in (None, *chain.rules):
                place = Place(table, chain, rule)
                found[_key(place)] = max(found.get(_key(place), 0), _count(place))
    return found


def _key(place: Place) -> str:
    return dataclasses.replace(place, path=()).text


def _count(place: Place) -> int:
    return place.rule.packets if place.rule else place.chain.packets


def _interface(number: int) -> str:
    try:
        return socket.if_indextoname(number) if number else ""
    except OSError:
        return ""
