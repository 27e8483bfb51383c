"""Every engine agrees with `decide()`: a budgeted number of policies, always the same ones.

`make test-equivalence N=2000` goes further. TPCTL_POLICIES sets the number here.
"""

from __future__ import annotations

import os

import pytest

from tests.equivalence.engines import DOORS
from tests.equivalence.harness import Bench
from tests.equivalence.run import drawn, run
from tests.extent import share
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup")]

POLICIES = int(os.environ.get("TPCTL_POLICIES", share(24, 40)))
_SEED = 1
_INSPECTED = 6


@pytest.mark.parametrize("name", sorted(DOORS))
def test_engine_agrees_with_the_specification(name: str) -> None:
    outcome = run(DOORS[name], drawn(POLICIES, _SEED))
    assert outcome.score.policies >= POLICIES
    assert not outcome.wrong, (
        f"{len(outcome.wrong)} of {outcome.score.connections} connections; the first, to be pinned:\n{outcome.smallest}"
    )


@pytest.mark.parametrize("name", sorted(DOORS))
def test_the_kernel_holds_what_was_planned(name: str) -> None:
    door = DOORS[name]
    with Bench(door) as bench:
        for policy in map(door.possible, drawn(_INSPECTED, _SEED)):
            staging = bench.stage(policy)
            with Lab(staging.layout) as lab, lab.inside(HOST):
                engine = door.load()
                plan = engine.plan(staging.policy)
                engine.apply(plan)
                engine.apply(plan)  # a replacement comes out like a first install
                found = engine.inspect(plan)
                assert not found.drift, "\n".join(found.drift)
                assert found.families == tuple(sorted(map(int, staging.policy.families)))
