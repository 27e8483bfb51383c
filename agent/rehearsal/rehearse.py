"""Carries a policy out in a scratch laboratory and compares what really happens with what `decide()` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from agent.decide import Action, Connection, Verdict, decide
from agent.engine_options import EngineOptions
from agent.engines.base import Engine
from agent.policy import Family, Policy, Protocol, Redirection
from agent.rehearsal.cgroup import OwnGroups, own_groups, own_place
from agent.rehearsal.lab import NEGATIVE_SECONDS, PATIENCE_SECONDS, Lab
from agent.rehearsal.layout import HOST, Layout, seat, stage
from agent.rehearsal.namespaces import has_ipv6
from agent.rehearsal.probes import Probe, probes
from agent.rehearsal.sockets import Answer, Seat


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
            return self.answer.outcome == "timeout"
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
        from agent.engines.registry import select

        return select(options).engine

    with own_groups() if policy.cgroup else nullcontext() as groups:
        return _rehearsed(policy, selected, groups)


def _rehearsed(policy: Policy, load: Callable[[], Engine[Any]], groups: OwnGroups | None) -> Rehearsal:
    from agent import loopback, routing

    families = frozenset(Family) if has_ipv6() else frozenset({Family.IPV4})
    staging = stage(policy, families, groups.service if groups else None)
    with Lab(staging.layout, groups) as lab:
        with lab.inside(HOST):
            engine = load()
            if Family.IPV6 in staging.policy.families:
                loopback.add(staging.policy.loopback)
            if staging.policy.inbound.is_transparent:
                routing.add(staging.policy.loopback, staging.policy.families)
            notices = engine.apply(engine.plan(staging.policy)).notices
        lab.serve_data_plane(staging.policy)
        results = tuple(attempt(lab, staging.policy, probes(staging.policy, staging.layout)))
    return Rehearsal(staging.policy, engine.name, engine.variant, results, (*staging.notes, *notices))


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
        answer = lab.dial(probe.connection, timeout=patience if expected else silence)
        if expected and answer.outcome == "timeout":
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
    if verdict.action is Action.DROP:
        return None
    if verdict.action is Action.REDIRECT:
        assert verdict.port is not None
        return Seat(HOST, verdict.port)
    return Seat(*seat(layout, connection))
