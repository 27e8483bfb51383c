"""Carries a policy out in a scratch laboratory and compares what really happens with what `decide()` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.decide import Action, Connection, Verdict, decide
from agent.engine_options import EngineOptions
from agent.errors import HostError
from agent.policy import Family, Policy, Protocol
from agent.rehearsal.lab import NEGATIVE_SECONDS, Lab
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

    Raises HostError when there is no iptables or no privilege to make namespaces, ApplyError when the kernel refuses.
    """
    from agent import loopback
    from agent.engines.registry import select

    families = frozenset(Family) if has_ipv6() else frozenset({Family.IPV4})
    staging = stage(policy, families)
    with Lab(staging.layout) as lab:
        with lab.inside(HOST):
            engine = select(options).engine
            if engine.name == "ebpf":  # its programs would be attached to the host's own cgroups
                raise HostError("the eBPF engine cannot be rehearsed: its programs are not confined to a namespace")
            if Family.IPV6 in staging.policy.families:
                loopback.add(staging.policy.loopback)
            notices = engine.apply(engine.plan(staging.policy)).notices
        lab.serve_data_plane(staging.policy)
        results = tuple(attempt(lab, staging.policy, probes(staging.policy, staging.layout)))
    return Rehearsal(staging.policy, engine.name, engine.variant, results, (*staging.notes, *notices))


def attempt(
    lab: Lab, policy: Policy, wanted: Iterable[Probe], *, timeout: float = NEGATIVE_SECONDS
) -> Iterator[Result]:
    """Try each probe in turn, waiting at most `timeout` seconds for each."""
    for probe in wanted:
        verdict = decide(policy, probe.connection)
        expected = expectation(lab.layout, verdict, probe.connection)
        lab.serve(probe.connection)
        answer = lab.dial(probe.connection, timeout=timeout)
        redirected_tcp = verdict.action is Action.REDIRECT and probe.connection.protocol == Protocol.TCP
        wanted_original = (probe.connection.destination, probe.connection.destination_port)
        kept = not redirected_tcp or answer.original == wanted_original
        yield Result(probe, verdict, expected, answer, kept)


def expectation(layout: Layout, verdict: Verdict, connection: Connection) -> Seat | None:
    """Who answers a connection when the verdict is carried out."""
    if verdict.action is Action.DROP:
        return None
    if verdict.action is Action.REDIRECT:
        assert verdict.port is not None
        return Seat(HOST, verdict.port)
    return Seat(*seat(layout, connection))
