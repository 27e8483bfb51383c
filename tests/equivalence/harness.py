"""Carries a policy out with an engine in a laboratory, and finds the connections that end elsewhere than they should.

Making namespaces takes longer than everything else, so a laboratory serves every policy whose topology it has: the next
policy replaces the one before, as it would on a host. Whatever comes out wrong is tried again before it is believed: a
two-processor machine that does something else at the same time loses a packet now and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tests.equivalence.connections import random_connections, stateful_connections
from tests.equivalence.engines import Door
from tests.equivalence.paste import as_code
from tests.equivalence.segments import Running, is_answered
from tests.equivalence.surroundings import IDLE_PORTS, Surroundings
from tpctl.change import loopback, routing
from tpctl.engines.base import Engine
from tpctl.rehearsal import lab as laboratory
from tpctl.rehearsal.cast import Probe
from tpctl.rehearsal.cgroup import OwnGroups, own_groups
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, LOOPBACK, PEER_ADDRESS, Layout, Staging, member, stage
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.rehearse import SILENT_OUTCOME, attempt
from tpctl.spec.connection import Connection, State
from tpctl.spec.decide import decide
from tpctl.spec.policy import Cgroup, Family, Policy, Protocol
from tpctl.spec.verdict import Action

NEGATIVE_SECONDS = laboratory.NEGATIVE_SECONDS
CONFIRM_SECONDS = 5.0
"""For whatever came out wrong, and for what is tried once only: whoever should answer may be kept from it for long."""
HASTY_SECONDS = 0.3
"""For broken engines, nearly all of whose surprises are real."""
_DROPPED_SECONDS = 0.03
_IMPATIENT_SECONDS = 1.0
"""For connections that a policy which is still there may let pass or not."""
_SETTLE_SECONDS = 15.0
_KEPT_LABS = 24

Planner = Callable[[Engine[Any], Policy], Any]
"""From an engine and a policy to the plan that is applied; tests of the suite itself hand out broken ones."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One connection that an engine treats otherwise than `decide()` says."""

    policy: Policy
    connection: Connection
    label: str
    expected: str
    got: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.label}: expected {self.expected} ({self.reason}), got {self.got}\n"
            f"    (\n        {as_code(self.policy)},\n        {as_code(self.connection)},\n    )"
        )


@dataclass(slots=True)
class Score:
    """What a bench has done."""

    policies: int = 0
    connections: int = 0
    doubts: int = 0
    """Connections that ended elsewhere once, and as they should when they were tried again."""


def straight(engine: Engine[Any], policy: Policy) -> Any:
    """The engine's own plan."""
    return engine.plan(policy)


class _Seat:
    """A laboratory with the engine loaded in its host."""

    def __init__(self, layout: Layout, door: Door, groups: OwnGroups) -> None:
        self.lab = Lab(layout, groups)
        try:
            with self.lab.inside(HOST):
                loopback.add(LOOPBACK)
                routing.add(LOOPBACK, Family)
                self.engine = door.load()
            self.surroundings = Surroundings(self.lab)
            _settle(self.lab)
        except BaseException:
            self.lab.close()
            raise

    def close(self) -> None:
        self.surroundings.close()
        self.lab.close()


class Bench:
    """One engine and its laboratories. Use as a context manager; everything is gone at the end."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.score = Score()
        self._seats: dict[Layout, _Seat] = {}
        self._around = ExitStack()
        self.groups: OwnGroups

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            stack.enter_context(self.door.surroundings())
            self.groups = stack.enter_context(own_groups())
            self._around = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._around:
            self.start_afresh()

    def stage(self, policy: Policy) -> Staging:
        """The policy made fit for a laboratory of this bench, and its topology."""
        return stage(policy, cgroup=self.groups.service)

    def start_afresh(self) -> None:
        """Let all laboratories go."""
        for seat in self._seats.values():
            seat.close()
        self._seats.clear()

    def plan(self, policy: Policy, layout: Layout) -> Any:
        """The engine's plan for a staged policy."""
        return self._seat(layout).engine.plan(policy)

    def compare(
        self, policy: Policy, more: Callable[[Policy, Layout], Sequence[Connection]], plan: Planner = straight,
        *, first_only: bool = False,
    ) -> list[Disagreement]:  # fmt: skip
        """The disagreements on a policy's own probes and `more` connections. The policy is staged first."""
        staging = self.stage(policy)
        random = [Probe("a connection besides the probes", each) for each in more(staging.policy, staging.layout)]
        wanted = [*probes(staging.policy, staging.layout), *random]
        return self.try_all(staging.policy, staging.layout, wanted, plan, first_only=first_only)

    def try_all(
        self, policy: Policy, layout: Layout, wanted: Sequence[Probe], plan: Planner = straight,
        *, first_only: bool = False,
    ) -> list[Disagreement]:  # fmt: skip
        """The disagreements on some connections, of whatever state; with `first_only` it stops when there is one."""
        seat, running = self._begin(layout, [probe for probe in wanted if probe.connection.state is State.MIDSTREAM])
        try:
            with seat.lab.inside(HOST):
                seat.engine.apply(plan(seat.engine, policy))
            seat.surroundings.suit(policy)
            seat.surroundings.forget_connections()
            seconds = HASTY_SECONDS if first_only else CONFIRM_SECONDS
            found = [_broken(policy, each) for each in running if not each.goes_on(seconds)]
        finally:
            for each in running:
                each.close()
        seat.lab.forget(HOST)
        seat.lab.serve_data_plane(policy)
        found += self._invalid(seat, policy, [p for p in wanted if p.connection.state is State.INVALID])
        if not (found and first_only):
            found += self._new(seat, policy, [p for p in wanted if p.connection.state is State.NEW], first_only)
        # libnftables waits with select(2), which ends the process when it is given a descriptor above 1023.
        for node in seat.lab.spaces:
            seat.lab.forget(node)
        self.score.policies += 1
        self.score.connections += len(wanted)
        return found

    def _begin(self, layout: Layout, wanted: Sequence[Probe]) -> tuple[_Seat, list[Running]]:
        """A laboratory, and connections that run there; a new one when the rules in it let none pass."""
        seat = self._seat(layout)
        try:
            return seat, _begin(seat, wanted, _IMPATIENT_SECONDS)
        except OSError:
            self._seats.pop(layout).close()
            seat = self._seat(layout)
            return seat, _begin(seat, wanted, _SETTLE_SECONDS)

    def _seat(self, layout: Layout) -> _Seat:
        seat = self._seats.pop(layout, None) or _Seat(layout, self.door, self.groups)
        self._seats[layout] = seat
        while len(self._seats) > _KEPT_LABS:
            oldest = next(iter(self._seats))
            self._seats.pop(oldest).close()
        return seat

    def _new(self, seat: _Seat, policy: Policy, wanted: Sequence[Probe], first_only: bool) -> list[Disagreement]:
        found = []
        for result in attempt(seat.lab, policy, wanted, timeout=NEGATIVE_SECONDS):
            if result.ok:
                continue
            seconds = HASTY_SECONDS if first_only else CONFIRM_SECONDS
            again = self._once_more(seat, policy, result.probe, wanted, seconds)
            if again:
                found.append(again)
                if first_only:
                    break
            else:
                self.score.doubts += 1
        return found

    def _once_more(
        self, seat: _Seat, policy: Policy, probe: Probe, wanted: Iterable[Probe], seconds: float
    ) -> Disagreement | None:
        """Try a connection again, with those that share its source port: only together do they mean anything."""
        port = probe.connection.source_port
        group = [each for each in wanted if each.connection.source_port == port] if port else [probe]
        seat.surroundings.forget_connections()
        for result in attempt(seat.lab, policy, group, timeout=seconds):
            if not result.ok and result.probe is probe:
                return Disagreement(
                    policy,
                    probe.connection,
                    probe.label,
                    str(result.expected or SILENT_OUTCOME[result.verdict.action]),
                    f"{result.answer}{'' if result.original_kept else ', its destination lost'}",
                    f"{result.verdict.rule}, zone {result.verdict.zone}: {result.verdict.reason}",
                )
        return None

    def _invalid(self, seat: _Seat, policy: Policy, wanted: Sequence[Probe]) -> list[Disagreement]:
        found = []
        for number, probe in enumerate(wanted):
            verdict = decide(policy, probe.connection)
            arrives = verdict.action is not Action.DROP
            seconds = CONFIRM_SECONDS if arrives else _DROPPED_SECONDS
            got = is_answered(seat.lab, probe.connection, IDLE_PORTS[-1] - number, seconds)
            if got is not arrives:
                words = {True: "arrives", False: "dropped"}
                found.append(
                    Disagreement(policy, probe.connection, probe.label, words[arrives], words[got], verdict.rule)
                )
        return found


def relocated(connection: Connection, cgroup: Cgroup | None, now: Cgroup | None) -> Connection:
    """A connection of a policy with `cgroup`, when another group stands for that now: each run has its own."""
    if cgroup is None or now is None or connection.cgroup is None:
        return connection
    inside = cgroup.holds(connection.cgroup)
    moved = now.path + connection.cgroup.removeprefix(cgroup.path) if inside else now.path.rpartition("/")[0]
    return dataclasses.replace(connection, cgroup=moved)


def _begin(seat: _Seat, wanted: Sequence[Probe], seconds: float) -> list[Running]:
    """Connections that conntrack does not know when the policy comes. Raises OSError when one cannot be had in time."""
    if not wanted:
        return []
    seat.surroundings.idle(True)
    running: list[Running] = []
    try:
        for number, probe in enumerate(wanted):
            connection = dataclasses.replace(probe.connection, source_port=IDLE_PORTS[number])
            running.append(Running(seat.lab, connection, seconds))
    except BaseException:
        for each in running:
            each.close()
        raise
    finally:
        seat.surroundings.idle(False)
    return running


def _broken(policy: Policy, running: Running) -> Disagreement:
    verdict = decide(policy, running.connection)
    return Disagreement(
        policy, running.connection, "a connection that was there before", "it goes on", "it was cut", verdict.rule
    )


def _settle(lab: Lab) -> None:
    """Wait until packets pass everywhere: the kernel brings links up in its own time, and neighbours have to be found.

    Raises AssertionError when they never do.
    """
    for family in sorted(lab.layout.families):
        remote, own = PEER_ADDRESS[family], HOST_ADDRESS[family]
        pairs = [lab.layout.outgoing(Protocol.TCP, remote, 9, 0), lab.layout.arriving(remote, own, Protocol.TCP, 9)]
        for bridge in lab.layout.bridges:
            for network in bridge.networks:
                if Family.of(network) is family:
                    inside = member(network)
                    pairs.append(lab.layout.outgoing(Protocol.TCP, inside, 9, 0))
                    pairs.append(lab.layout.arriving(inside, own, Protocol.TCP, 9))
                    pairs.append(lab.layout.arriving(inside, remote, Protocol.TCP, 9))
        for connection in pairs:
            lab.serve(connection)
            answer = lab.dial(connection, timeout=_SETTLE_SECONDS)
            assert answer.seat, f"{connection}: {answer} in a fresh laboratory"


def usual(policy: Policy, layout: Layout, seed: int, count: int) -> list[Connection]:
    """Random connections and those of every state, besides the probes."""
    return [*random_connections(policy, layout, seed, count), *stateful_connections(policy, layout)]
