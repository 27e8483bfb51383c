"""A sample of `make test-crash`: killed, or failing, at some of the points.

In `make test` they are always the same, so that a commit is judged alike whenever it is; `make test-all` chooses them
by the clock, and a failure names its own. `python -m tests.crash --engine E --command C --step 1 --verbose` tries all.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.crash import way_back
from tests.crash.campaign import FAILURES, HANGS, KILLS, Interference, Trial, attempt
from tests.crash.commands import AWAITED, ORDINARY, ROLLED_BACK, points_of
from tests.crash.healing import CONFIRM, INSTALL, UNINSTALL
from tests.crash.scene import Scene, scene
from tests.extent import IS_WHOLE, takes_long
from tpctl.rehearsal.cgroup import own_place

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

TRIALS = 4
PATIENCE_SECONDS = 60.0
_OFFSET = int(time.time()) if IS_WHOLE else 0


@pytest.fixture(scope="module", params=["nftables", "iptables nft", "iptables legacy", "ebpf"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with own_place() as place, scene(request.param, place, tmp_path_factory.mktemp("scene")) as one:
        yield one


def try_some(made: Scene, command: str, ways: Sequence[Interference], healings: Sequence[str], trials: int) -> None:
    count = len(points_of(made, command))
    made.host.leave(PATIENCE_SECONDS)
    for number in range(trials):
        at = 1 + (_OFFSET + number * count // trials) % count
        trial = attempt(made, command, ways[number % len(ways)], at, healings[number % len(healings)])
        if trial or command in ORDINARY:  # a guardian that had the lock for a moment made the first run longer
            check(trial)


def check(trial: Trial | None) -> None:
    assert trial, "there is no such point any more"
    assert not trial.faults, str(trial)
    assert trial.state in {"old", "new", "between"}


def test_a_sample_of_points(made: Scene) -> None:
    ways = (*KILLS, FAILURES[_OFFSET % len(FAILURES)])
    try_some(made, ORDINARY[(_OFFSET // 7) % len(ORDINARY)], ways, (INSTALL, UNINSTALL), TRIALS)


def test_a_sample_of_what_awaits_confirmation(made: Scene) -> None:
    try_some(made, AWAITED[(_OFFSET // 7) % len(AWAITED)], KILLS, (CONFIRM, INSTALL, UNINSTALL)[_OFFSET % 2 :], 2)


def test_killed_on_the_way_back_of_the_very_last_step(made: Scene) -> None:
    command = ROLLED_BACK[_OFFSET % len(ROLLED_BACK)]
    names = points_of(made, command)
    at = max(at for at, point in enumerate(names, 1) if point.startswith("rename /run/"))
    way = way_back.of(made, command, at)
    assert way, f"a failure at {at} of {command} is not rolled back"
    interference = dataclasses.replace(
        way.failure, then=KILLS[_OFFSET % len(KILLS)].how, later=1 + _OFFSET % len(way.points)
    )
    check(attempt(made, command, interference, at, (INSTALL, UNINSTALL)[_OFFSET // 2 % 2]))


def test_a_table_that_could_not_be_taken_back_at_once_is_taken_back_again(tmp_path: Path) -> None:
    """The child that does so is killed, when the last of the programs was refused."""
    with own_place() as place, scene("ebpf", place, tmp_path) as made:
        attached = [at for at, point in enumerate(points_of(made, "install"), 1) if point == "bpf create a link"]
        way = way_back.of(made, "install", attached[-1])
        assert way
        (later, *_) = (number for number, point in enumerate(way.points, 1) if "nf_tables transaction" in point)
        killed = dataclasses.replace(way.failure, then=KILLS[0].how, later=later)
        check(attempt(made, "install", killed, way.at, UNINSTALL))


def test_an_uninstall_takes_the_empty_folder_away_that_a_killed_one_left(tmp_path: Path) -> None:
    with own_place() as place, scene("ebpf", place, tmp_path) as made:
        made.install("old")
        points = made.host("uninstall").points
        at = next(at for at, point in enumerate(points, 1) if point == "rmdir /sys/fs/bpf/tpctl")
        made.install("old")
        assert made.host("uninstall", faults=KILLS[1].faults(at)).hit
        assert "/sys/fs/bpf/tpctl/" in made.held()
        made.uninstall()
        assert made.held() == made.base


def test_a_first_install_that_fails_leaves_no_base_chain(tmp_path: Path) -> None:
    with own_place() as place, scene("iptables nft", place, tmp_path) as made:
        points = points_of(made, "install")
        programs = [at for at, point in enumerate(points, 1) if "transaction (ip" in point]
        assert programs
        for number, at in enumerate(programs):
            check(attempt(made, "install", FAILURES[number % len(FAILURES)], at, UNINSTALL))


def test_an_uninstall_whose_last_steps_fail_says_that_nothing_is_redirected(tmp_path: Path) -> None:
    with own_place() as place, scene("nftables", place, tmp_path) as made:
        points = points_of(made, "uninstall")
        last = [at for at, point in enumerate(points, 1) if point.endswith(("state.json", "pending.json"))]
        assert len(last) == 1  # the record; no change awaits confirmation, so there is no file of that to remove
        for at in last:
            for failure, exits in ((FAILURES[0], 1), (FAILURES[-1], 0)):  # on a read-only disk it can only be said
                trial = attempt(made, "uninstall", failure, at, "uninstall")
                assert trial
                assert not trial.faults, str(trial)
                assert (trial.state, trial.exit) == ("new", exits)


@pytest.mark.parametrize(
    ("command", "which", "state"),
    [
        pytest.param("install", 0, "old", id="whether-it-could", marks=takes_long),
        pytest.param("install", 2, "old", id="when-the-rules-come"),
        pytest.param("uninstall", 0, "old", id="when-the-rules-go", marks=takes_long),
    ],
)
def test_a_kernel_that_does_not_answer(command: str, which: int, state: str, tmp_path: Path) -> None:
    with own_place() as place, scene("nftables", place, tmp_path) as made:
        points = points_of(made, command)
        transactions = [at for at, point in enumerate(points, 1) if point.endswith(")")]
        trial = attempt(made, command, HANGS[0], transactions[which], "uninstall")
        assert trial
        assert not trial.faults, str(trial)
        assert trial.state == state


@pytest.mark.skipif(not shutil.which("firewall-offline-cmd"), reason="no firewalld here")
def test_what_was_being_written_for_firewalld_is_cleared(tmp_path: Path) -> None:
    with own_place() as place, scene("iptables nft, firewalld", place, tmp_path) as made:
        points = points_of(made, "install")
        at = next(
            at for at, point in enumerate(points, 1) if point.startswith("write /etc/firewalld/.tpctl-direct.xml")
        )
        trial = attempt(made, "install", KILLS[0], at, "uninstall")
        assert trial
        assert not trial.faults, str(trial)
        made.install("new")
        made.host.write("/etc/firewalld/.tpctl-direct.xml-left", "")
        made.host.shell(
            "iptables-nft -t nat -D PREROUTING $(iptables-nft -t nat -S PREROUTING | wc -l | xargs expr -1 +)"
        )
        made.install("new")
        assert made.litter() == [], "an install that has nothing to write clears it as well"
