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


def door(*, chooses_sockets: bool = True) -> Door:
    """The engine, attached to a cgroup that only this process is in; as on a kernel without sk_lookup, if so wished."""
    places: list[OwnPlace] = []

    @contextlib.contextmanager
    def surroundings() -> Iterator[None]:
        with own_place() as place:
            places.append(place)
            yield

    def load() -> EbpfEngine:
        return places[-1].engine(chooses_sockets=chooses_sockets)

    return Door("ebpf", load, surroundings)


def possible(policy: Policy) -> Policy:
    """The policy without what the engine refuses."""
    bypass = policy.when_proxy_down is WhenProxyDown.BYPASS
    return dataclasses.replace(policy, virtual_networks=() if bypass else policy.virtual_networks, log_level=None)


@pytest.mark.parametrize("bypass", [False, True])
def test_engine_agrees_with_the_specification(bypass: bool) -> None:
    count = POLICIES // 4 if bypass else POLICIES
    when = WhenProxyDown.BYPASS if bypass else WhenProxyDown.BLOCK
    agrees(door(), [possible(dataclasses.replace(policy, when_proxy_down=when)) for policy in drawn(count, _SEED)])


def test_without_sk_lookup_nftables_does_what_arrives() -> None:
    agrees(door(chooses_sockets=False), [possible(policy) for policy in drawn(POLICIES // 2, _SEED + 1)])


def agrees(engine: Door, policies: list[Policy]) -> None:
    outcome = run(engine, policies)
    assert outcome.score.policies >= len(policies)
    assert not outcome.wrong, (
        f"{len(outcome.wrong)} of {outcome.score.connections} connections; the first, to be pinned:\n{outcome.smallest}"
    )
