"""Policies and engines are swapped while applications open connections without pause: none leaks, fails or is cut."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.swap.scene import Scene, outbound, scene
from tests.swap.swaps import (
    AT_LEAST,
    EBPF,
    ENGINES,
    EXCLUDING,
    KUMACTL,
    NFTABLES,
    POLICIES,
    Outcome,
    Target,
    between,
    broken,
    inside,
    keep,
    name,
    roll_back_to,
    roll_back_to_kumactl,
    swap,
    swap_kumactl,
    timed_install,
)
from tests.swap.traffic import APP, FAMILIES, REAL, Applications
from tpctl.bpf.programs import Program
from tpctl.engines.ebpf import place
from tpctl.engines.ebpf.installed import Switch
from tpctl.spec.engine_options import EngineOptions

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup")]

SWAPS = int(os.environ.get("TPCTL_SWAPS", "18"))
CONNECTIONS = AT_LEAST * SWAPS
GAPS, PATIENCE_SECONDS = 3, 120.0

engine = pytest.mark.parametrize("options", ENGINES, ids=name)


def flawless(total: Outcome) -> None:
    """Nothing leaked, failed or was cut, and enough happened to tell."""
    print(f"{total.swaps} swaps in {total.seconds:.2f} s, {total.tally}")
    assert (total.tally.leaked, total.tally.failed) == (0, 0), total.tally
    assert total.cut == []


def run(made: Scene, first: Target, targets: list[Target]) -> Outcome:
    """All the swaps as one."""
    total = Outcome()
    for _, _, outcome in swap(made, first, targets):
        total.swaps += outcome.swaps
        total.seconds += outcome.seconds
        total.tally += outcome.tally
        total.cut += outcome.cut
    assert total.swaps == len(targets)
    assert total.tally.connections >= CONNECTIONS
    return total


@engine
def test_swaps_inside_an_engine(options: EngineOptions) -> None:
    with scene() as made:
        flawless(run(made, Target(POLICIES[0], options), inside(options, SWAPS)))


@pytest.mark.needs("ebpf", "legacy")
def test_swaps_between_engines() -> None:
    with scene() as made:
        flawless(run(made, Target(POLICIES[0], NFTABLES), between(SWAPS)))


@engine
@pytest.mark.needs("legacy")
def test_swaps_from_kumactl(options: EngineOptions) -> None:
    with scene() as made:
        applications = made.applications()
        total = Outcome()
        for number, (variant, full) in enumerate(KUMACTL):
            outcome = swap_kumactl(made, applications, variant, full, Target.of(POLICIES[number], options))
            total.add(outcome.seconds, outcome.tally, outcome.cut)
        total.tally.reasons = applications.stop().reasons
        flawless(total)
        assert total.tally.connections > 0


@engine
def test_rollbacks_to_kumactl(options: EngineOptions) -> None:
    with scene() as made:
        applications = made.applications()
        total = Outcome()
        for number, (variant, full) in enumerate(KUMACTL):
            outcome = roll_back_to_kumactl(made, applications, variant, full, Target.of(POLICIES[number], options))
            total.add(outcome.seconds, outcome.tally, outcome.cut)
        total.tally.reasons = applications.stop().reasons
        flawless(total)
        assert total.tally.connections > 0


def test_rollbacks_between_engines() -> None:
    with scene() as made:
        applications = made.applications()
        total = Outcome()
        targets = [Target(POLICIES[0], NFTABLES), *between(len(ENGINES))]
        for first, target in itertools.pairwise(targets):
            outcome = roll_back_to(made, applications, first, target)
            total.add(outcome.seconds, outcome.tally, outcome.cut)
        total.tally.reasons = applications.stop().reasons
        flawless(total)
        assert total.tally.connections > 0


@engine
def test_what_is_excluded_is_never_redirected(options: EngineOptions) -> None:
    """To these applications the real server is who should answer."""
    with scene() as made:
        made.install(EXCLUDING[0], options)
        applications = Applications([(made.host, APP, outbound(family, REAL)) for family in FAMILIES])
        applications.resume()
        for turn in range(SWAPS):
            timed_install(made, Target.of(EXCLUDING[(turn + 1) % len(EXCLUDING)], options))
            applications.at_least(AT_LEAST // 2 * (turn + 1))
        seen = applications.stop()
        assert seen.failed == 0, seen.reasons


@engine
def test_a_gap_is_seen(options: EngineOptions) -> None:
    """Uninstall and install is what a swap must not be; were it not seen, the tests above would prove nothing."""
    with scene() as made:
        made.install(POLICIES[0], options)
        applications = made.applications()
        applications.resume()
        applications.at_least(1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        gaps = 0
        while gaps < GAPS or (not applications.tally().leaked and time.monotonic() < deadline):
            gaps += 1
            made.uninstall()
            made.install(POLICIES[0], options)
        seen = applications.stop()
        assert seen.leaked > 0
        assert seen.failed == 0, seen.reasons  # neither end of an installation breaks a connection
        assert seen.proxied > 0


@engine
def test_connections_that_ran_before_an_install_go_on(options: EngineOptions) -> None:
    """Conntrack was idle, so to it their next segments are the first."""
    for policy in POLICIES:
        with scene() as made:
            kept = keep(made, direct=True)
            made.install(Target.of(policy, options).policy, options)
            assert broken(kept) == []
            for group in kept:
                group.close()


@engine
def test_connections_through_the_data_plane_outlive_an_uninstall(options: EngineOptions) -> None:
    with scene() as made:
        made.install(POLICIES[0], options)
        through = keep(made, direct=False)
        made.uninstall()
        assert broken(through) == []
        past = keep(made, direct=True)
        assert broken([*through, *past]) == []
        for group in (*through, *past):
            group.close()


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_connections_through_kumactls_redirect_outlive_an_uninstall(variant: str) -> None:
    with scene() as made:
        made.install_kumactl(variant, full=True)
        through = keep(made, direct=False)
        made.uninstall()
        assert broken(through) == []
        for group in through:
            group.close()


@pytest.mark.needs("ebpf")
def test_the_hosts_own_connections_are_known_before_arriving_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last program is there, the old rules redirect what the host opens: to itself, from its own address."""
    with scene() as made:
        made.install(POLICIES[0], NFTABLES)
        put, through = Switch._put, []

        def put_and_dial(switch: Switch, program: Program, *rest: Any) -> None:
            put(switch, program, *rest)
            through.extend(keep(made, direct=False))

        monkeypatch.setattr(Switch, "_put", put_and_dial)
        made.install(POLICIES[0], EBPF)
        assert through
        assert broken(through) == []
        for group in through:
            group.close()


@pytest.mark.needs("ebpf")
def test_an_uninstall_finds_ebpf_programs_though_the_host_has_no_bpf_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are kept in another one, of which the install was told."""
    monkeypatch.setattr(place, "BPFFS", Path("/sys/fs/nowhere"))
    with scene() as made:
        made.install(POLICIES[0], EBPF)
        through = keep(made, direct=False)
        made.uninstall()
        past = keep(made, direct=True)
        for group in (*through, *past):
            group.close()
