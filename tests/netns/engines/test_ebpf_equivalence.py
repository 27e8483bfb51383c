"""The eBPF engine in its other ways agrees with `decide()` too; tests/equivalence has it beside the other engines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pytest

from tests.equivalence.engines import Door, ebpf_door
from tests.equivalence.run import drawn, run
from tests.extent import share
from tpctl.spec.policy import Policy, WhenProxyDown

pytestmark = pytest.mark.root

POLICIES = int(os.environ.get("TPCTL_POLICIES", share(24, 40))) // 4
_SEED = 1


def test_connections_bypass_an_absent_data_plane() -> None:
    bypass = WhenProxyDown.BYPASS
    agrees(ebpf_door(), [dataclasses.replace(policy, when_proxy_down=bypass) for policy in drawn(POLICIES, _SEED)])


def test_without_sk_lookup_nftables_does_what_arrives() -> None:
    agrees(ebpf_door(chooses_sockets=False), drawn(POLICIES, _SEED + 1))


def agrees(engine: Door, policies: Sequence[Policy]) -> None:
    outcome = run(engine, policies)
    assert outcome.score.policies >= len(policies)
    assert not outcome.wrong, (
        f"{len(outcome.wrong)} of {outcome.score.connections} connections; the first, to be pinned:\n{outcome.smallest}"
    )
