"""So many random policies through one engine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.equivalence.engines import Door
from tests.equivalence.harness import Bench, Disagreement, Score, usual
from tests.equivalence.policies import policies
from tests.equivalence.shrink import shrunk
from tpctl.rehearsal.cast import Probe
from tpctl.rehearsal.layout import LOOPBACK, Layout
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Policy

CONNECTIONS = 30
"""Random connections for each policy, besides its probes."""


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    score: Score
    wrong: list[Disagreement] = field(default_factory=list)
    smallest: Disagreement | None = None
    """The first of them with its policy made small."""


def drawn(count: int, start: int) -> list[Policy]:
    """So many policies; the same ones for the same start."""
    found: list[Policy] = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(policy=policies)
    def collect(policy: Policy) -> None:
        found.append(policy)

    collect()
    return found[:count]


def run(door: Door, wanted: Sequence[Policy], report: Callable[[str], None] = lambda _: None) -> Outcome:
    """Compare the engine with `decide()` on every policy."""
    with Bench(door) as bench:
        outcome = Outcome(bench.score)
        for number, policy in enumerate(map(door.possible, wanted), 1):
            wrong = bench.compare(policy, partial(usual, seed=number, count=CONNECTIONS))
            outcome.wrong += wrong
            if wrong and outcome.smallest is None:
                outcome.smallest = smallest(bench, wrong[0])
            if number % 100 == 0:
                report(
                    f"{door.name}: {number} policies, {bench.score.connections} connections, {len(outcome.wrong)} wrong"
                )
        return outcome


def smallest(bench: Bench, wrong: Disagreement) -> Disagreement:
    """The disagreement with a policy as small as one finds, in laboratories that had no policy before."""
    latest = wrong

    def is_wrong(policy: Policy) -> bool:
        nonlocal latest
        found = retried(bench, policy, wrong)
        latest = found[0] if found else latest
        return bool(found)

    bench.start_afresh()
    if not is_wrong(wrong.policy):
        return dataclasses.replace(wrong, label=f"{wrong.label} (only after another policy: see how it is replaced)")
    shrunk(wrong.policy, is_wrong)
    return latest


def retried(bench: Bench, policy: Policy, wrong: Disagreement) -> list[Disagreement]:
    """The same connection under another policy, if it exists on that one's topology."""
    staging = bench.stage(policy)
    layout, connection = staging.layout, wrong.connection
    if not _possible(layout, connection) or not (connection.local_source or policy.inbound.is_transparent):
        return []
    return bench.try_all(staging.policy, layout, [Probe(wrong.label, connection)])


def _possible(layout: Layout, connection: Connection) -> bool:
    uplinks, bridges = (link.name for link in layout.uplinks), (bridge.name for bridge in layout.bridges)
    return connection.interface in {LOOPBACK, *uplinks, *bridges}


def any_seed() -> int:
    """A start for a run that nobody chose."""
    return random.SystemRandom().randrange(2**31)
