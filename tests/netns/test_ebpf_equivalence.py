"""The eBPF engine agrees with `decide()` on random policies, of those that it does not refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import pytest

from agent.engines.ebpf.engine import EbpfEngine
from agent.policy import Policy, WhenProxyDown
from tests.equivalence.engines import Door
from tests.equivalence.run import drawn, run
from tests.netns.ebpf_place import OwnPlace, own_place

pytestmark = pytest.mark.root

POLICIES = int(os.environ.get("TPCTL_POLICIES", "40"))
_SEED = 1


def door() -> Door:
    """The engine, attached to a cgroup that only this process is in."""
    places: list[OwnPlace] = []

    @contextlib.contextmanager
    def surroundings() -> Iterator[None]:
        with own_place() as place:
            places.append(place)
            yield

    def load() -> EbpfEngine:
        return places[-1].engine()

    return Door("ebpf", load, surroundings)


def possible(policy: Policy) -> Policy:
    """The policy without what the engine refuses."""
    return dataclasses.replace(policy, virtual_networks=(), drop_invalid=False, log_level=None)


@pytest.mark.parametrize("bypass", [False, True])
def test_engine_agrees_with_the_specification(bypass: bool) -> None:
    count = POLICIES // 4 if bypass else POLICIES
    when = WhenProxyDown.BYPASS if bypass else WhenProxyDown.BLOCK
    policies = [dataclasses.replace(possible(policy), when_proxy_down=when) for policy in drawn(count, _SEED)]
    outcome = run(door(), policies)
    assert outcome.score.policies >= count
    assert not outcome.wrong, (
        f"{len(outcome.wrong)} of {outcome.score.connections} connections; the first, to be pinned:\n{outcome.smallest}"
    )
