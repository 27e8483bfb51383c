"""A sample of `make test-crash`: killed, or failing, at some of the points; other ones at each run.

The points are chosen by the clock, and a failure names its own. `python -m tests.crash --engine E --command C
--step 1 --verbose` tries them all.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from agent.rehearsal.cgroup import own_place
from tests.crash.campaign import FAILURES, HANGS, KILLS, Interference, attempt
from tests.crash.commands import ORDINARY, points_of
from tests.crash.scene import scene

pytestmark = pytest.mark.root

TRIALS = 4
_OFFSET = int(time.time())


@pytest.mark.parametrize("flavour", ["nftables", "iptables nft", "iptables legacy", "ebpf"])
def test_a_sample_of_points(flavour: str, tmp_path: Path) -> None:
    ways: tuple[Interference, ...] = (*KILLS, FAILURES[_OFFSET % len(FAILURES)])
    command = ORDINARY[(_OFFSET // 7) % len(ORDINARY)]
    with own_place() as place, scene(flavour, place, tmp_path) as made:
        count = len(points_of(made, command))
        states = set()
        for number in range(TRIALS):
            at = 1 + (_OFFSET + number * count // TRIALS) % count
            healing = ("install", "uninstall")[number % 2]
            trial = attempt(made, command, ways[number % len(ways)], at, healing)
            assert trial, f"there is no point {at} in {command} any more"
            assert not trial.faults, str(trial)
            states.add(trial.state)
        assert states <= {"old", "new", "between"}


def test_an_uninstall_whose_last_steps_fail_says_that_nothing_is_redirected(tmp_path: Path) -> None:
    with own_place() as place, scene("nftables", place, tmp_path) as made:
        points = points_of(made, "uninstall")
        last = [at for at, point in enumerate(points, 1) if point.endswith(("state.json", "pending.json"))]
        assert len(last) == 2
        for at in last:
            for failure in (FAILURES[0], FAILURES[-1]):
                trial = attempt(made, "uninstall", failure, at, "uninstall")
                assert trial
                assert not trial.faults, str(trial)
                assert (trial.state, trial.exit) == ("new", 1)


@pytest.mark.parametrize(("command", "state"), [("install", "old"), ("uninstall", "new")])
def test_a_kernel_that_does_not_answer_whether_it_could(command: str, state: str, tmp_path: Path) -> None:
    with own_place() as place, scene("nftables", place, tmp_path) as made:
        points = points_of(made, command)
        probe = next(at for at, point in enumerate(points, 1) if point.endswith(")"))
        trial = attempt(made, command, HANGS[0], probe, "uninstall")
        assert trial
        assert not trial.faults, str(trial)
        assert trial.state == state


@pytest.mark.skipif(not shutil.which("firewall-offline-cmd"), reason="no firewalld here")
def test_an_uninstall_clears_what_was_being_written_for_firewalld(tmp_path: Path) -> None:
    with own_place() as place, scene("iptables nft, firewalld", place, tmp_path) as made:
        points = points_of(made, "install")
        at = next(
            at for at, point in enumerate(points, 1) if point.startswith("write /etc/firewalld/.tpctl-direct.xml")
        )
        trial = attempt(made, "install", KILLS[0], at, "uninstall")
        assert trial
        assert not trial.faults, str(trial)
