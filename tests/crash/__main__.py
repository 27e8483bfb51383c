"""`python -m tests.crash`: prints what `make test-crash` promises; exits with 1 when anything is stuck."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.crash import at_once
from tests.crash.campaign import FAILURES, HANGS, KILLS, MOST_POINTS, Trial, campaign, summary
from tests.crash.commands import COMMANDS, ROLLED_BACK
from tests.crash.healing import UNINSTALL
from tests.crash.scene import FLAVOURS, Scene, scene
from tests.crash.way_back import ways_back
from tpctl.rehearsal.cgroup import own_place

ROW = "{:26} {:14} {:>6} {:>5} {:>5} {:>7} {:>6} {:>5} {:>7}"


def main() -> None:
    """Run the campaigns that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--engine", action="append", choices=FLAVOURS, help="default: all")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="default: all")
    parser.add_argument("--step", type=int, default=1, help="every so many points only")
    parser.add_argument("--turns", action="store_true", help="one interference a point, in turns, not each")
    parser.add_argument("--first", type=int, default=1, help="the first point to try")
    parser.add_argument("--last", type=int, default=MOST_POINTS, help="the last one")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--failing", action="store_true", help="let calls fail, instead of killing at them")
    parser.add_argument("--hanging", action="store_true", help="let calls of what tpctl started never come back")
    parser.add_argument("--rollback", action="store_true", help="let a call fail, then kill while that is rolled back")
    parser.add_argument("--at-once", type=int, metavar="N", help="only start so many commands at the same time")
    given = parser.parse_args()
    if given.at_once:
        sys.exit(0 if at_once.main(given.at_once) else 1)
    stuck = 0
    print(ROW.format("engine", "command", "tried", "old", "new", "between", "healed", "stuck", "seconds"))
    for flavour in given.engine or FLAVOURS:
        with (
            own_place() as place,
            tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
            scene(flavour, place, Path(folder)) as made,
        ):
            for command in given.command or (ROLLED_BACK if given.rollback else COMMANDS):
                began = time.monotonic()
                found = []
                for trial in _trials(made, command, given):
                    found.append(trial)
                    if given.verbose or trial.faults:
                        print(trial, flush=True)
                one = summary(found)
                stuck += one.stuck
                figures = (one.points, one.old, one.new, one.between, one.healed, one.stuck)
                print(ROW.format(flavour, command, *figures, round(time.monotonic() - began)), flush=True)
    sys.exit(1 if stuck else 0)


def _trials(made: Scene, command: str, given: argparse.Namespace) -> Iterator[Trial]:
    points = {"step": given.step, "first": given.first, "last": given.last, "turns": given.turns}
    if given.rollback:
        return ways_back(made, command, **points)
    interferences = HANGS if given.hanging else FAILURES if given.failing else KILLS
    return campaign(made, command, interferences, healings=(UNINSTALL,) if given.failing else (), **points)


if __name__ == "__main__":
    main()
