"""Carries a policy out in a scratch laboratory and compares what really happens with what `decide()` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tpctl.engines.base import Engine
from tpctl.rehearsal.cast import Probe
from tpctl.rehearsal.cgroup import OwnGroups, own_groups, own_place
from tpctl.rehearsal.lab import NEGATIVE_SECONDS, PATIENCE_SECONDS, Lab
from tpctl.rehearsal.layout import HOST, Layout, seat, stage
from tpctl.rehearsal.namespaces import has_ipv6
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.sockets import Answer, Seat
from tpctl.spec.connection import Connection
from tpctl.spec.decide import decide
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy, Protocol, Redirection
from tpctl.spec.verdict import Action, Verdict

SILENT_OUTCOME = {Action.DROP: "timeout", Action.RESET: "refused"}
"""What becomes of a connection that nobody should answer."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one probe should have met, and what it met."""

    probe: Probe
    verdict: Verdict
    expected: Seat | None
    """Who should answer; None when nobody should."""
    answer: Answer
    original_kept: bool = True
    """Whether the listener could recover the destination of a redirected TCP connection."""

    @property
    def ok(self) -> bool:
        """Whether the kernel did what the specification says."""
        if self.expected is None:
            return self.answer.outcome == SILENT_OUTCOME[self.verdict.action]
        return self.answer.seat == self.expected and self.original_kept


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A rehearsal's outcome."""

    policy: Policy
    engine: str
    variant: str | None
    results: tuple[Result, ...]
    notes: tuple[str, ...]
    """What could not be rehearsed, and what the engine had to say."""

    @property
    def ok(self) -> bool:
        """Whether every probe ended where the specification says."""
        return all(result.ok for result in self.results)


def rehearse(policy: Policy, options: EngineOptions) -> Rehearsal:
    """Rehearse `policy` with the engine of `options`. The host's own namespace is not touched.

    With a control group in the policy, and for the eBPF engine, this process is in groups of its own meanwhile.
    Raises HostError when the engine does not work here or there is no privilege to make namespaces and control groups,
    ApplyError when the kernel refuses.
    """
    if options.engine == "ebpf":  # its programs are not confined to a namespace
        with own_place() as place:
            return _rehearsed(policy, lambda: place.engine(options), place.groups)

    def selected() -> Engine[Any]:
        from tpctl.engines.registry import select

        return select(options).engine

    with own_groups() if policy.cgroup else nullcontext() as groups:
        return _rehearsed(policy, selected, groups)


def _rehearsed(policy: Policy, load: Callable[[], Engine[Any]], groups: OwnGroups | None) -> Rehearsal:
    from tpctl.change import facts, loopback, routing

    families = frozenset(Family) if has_ipv6() else frozenset({Family.IPV4})
    staging = stage(policy, families, groups.service if groups else None)
    with Lab(staging.layout, groups) as lab:
        with lab.inside(HOST):
            engine = load()
            if Family.IPV6 in staging.policy.families:
                loopback.add(staging.policy.loopback)
            if staging.policy.inbound.is_transparent:
                routing.add(staging.policy.loopback, staging.policy.families)
            rehearsed, unguarded = facts.guarded(staging.policy.through(engine.name), engine)
            notices = (*unguarded, *engine.apply(engine.plan(rehearsed)).notices)
        lab.serve_data_plane(rehearsed)
        results = tuple(attempt(lab, rehearsed, probes(rehearsed, staging.layout)))
    return Rehearsal(rehearsed, engine.name, engine.variant, results, (*staging.notes, *notices))


def attempt(lab: Lab, policy: Policy, wanted: Iterable[Probe], *, timeout: float | None = None) -> Iterator[Result]:
    """Try each probe in turn, waiting at most `timeout` seconds for each.

    Left out, answers that should come are waited for patiently until one did not, and silence is soon believed.
    """
    patience = PATIENCE_SECONDS if timeout is None else timeout
    silence = NEGATIVE_SECONDS if timeout is None else timeout
    for probe in wanted:
        verdict = decide(policy, probe.connection)
        expected = expectation(lab.layout, verdict, probe.connection)
        lab.serve(probe.connection)
        told = verdict.action is not Action.DROP
        answer = lab.dial(probe.connection, timeout=patience if told else silence)
        if told and answer.outcome == "timeout":
            patience = silence
        yield Result(probe, verdict, expected, answer, _is_destination_kept(verdict, probe.connection, answer))


def _is_destination_kept(verdict: Verdict, connection: Connection, answer: Answer) -> bool:
    """Whether the data plane learns where a TCP connection was going, the way it is redirected."""
    if verdict.action is not Action.REDIRECT or connection.protocol != Protocol.TCP:
        return True
    told = answer.name if verdict.how is Redirection.TPROXY else answer.original
    return told == (connection.destination, connection.destination_port)


def expectation(layout: Layout, verdict: Verdict, connection: Connection) -> Seat | None:
    """Who answers a connection when the verdict is carried out."""
    if verdict.action in SILENT_OUTCOME:
        return None
    if verdict.action is Action.REDIRECT:
        assert verdict.port is not None
        return Seat(HOST, verdict.port)
    return Seat(*seat(layout, connection))
