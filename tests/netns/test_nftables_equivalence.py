"""The nftables engine agrees with `decide()`: random policies, random connections, real sockets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from agent import loopback
from agent.decide import Connection
from agent.engines.nftables.engine import load
from agent.policy import Family, Policy
from agent.rehearsal.lab import Lab
from agent.rehearsal.layout import HOST, Staging, stage
from agent.rehearsal.probes import Probe, probes
from agent.rehearsal.rehearse import attempt
from tests.netns.test_equivalence_iptables import CONNECTIONS_PER_POLICY, POLICIES_PER_VARIANT, connections, policies

pytestmark = pytest.mark.root


def wrong_answers(staging: Staging, more: Sequence[Connection]) -> list[str]:
    """The connections that ended elsewhere than decide() says, and what the kernel holds that was not planned."""
    policy, layout = staging.policy, staging.layout
    random = [Probe("a random connection", connection) for connection in more]
    with Lab(layout) as lab:
        with lab.inside(HOST):
            engine = load()
            if Family.IPV6 in policy.families:
                loopback.add(policy.loopback)
            plan = engine.plan(policy)
            # Twice, because a replacement must come out like a first install.
            engine.apply(plan)
            engine.apply(plan)
            found = engine.inspect(plan)
            assert found.families == tuple(sorted(map(int, policy.families)))
            wrong = list(found.drift)
        lab.serve_data_plane(policy)
        return wrong + [
            f"{result.probe.label}: {result.probe.connection}\n  expected {result.expected}, because "
            f"{result.verdict.reason} ({result.verdict.rule}, zone {result.verdict.zone})\n  got {result.answer}"
            for result in attempt(lab, policy, [*probes(policy, layout), *random])
            if not result.ok
        ]


def test_engine_agrees_with_the_specification() -> None:
    @settings(
        max_examples=POLICIES_PER_VARIANT,
        deadline=None,
        derandomize="TPCTL_POLICIES" not in os.environ,
        database=None,
        print_blob=False,
        phases=[Phase.generate],  # shrinking takes minutes of namespaces; the policy is printed as drawn
        suppress_health_check=list(HealthCheck),
    )
    @given(policy=policies, data=st.data())
    def agree(policy: Policy, data: st.DataObject) -> None:
        staging = stage(policy)
        wrong = wrong_answers(
            staging, data.draw(st.lists(connections(staging.layout), max_size=CONNECTIONS_PER_POLICY))
        )
        note(f"policy: {policy}")
        assert not wrong, "\n".join(wrong)

    agree()
