"""Two faults in one run: a call fails, and tpctl is killed while it takes back what it had done until then."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.crash.campaign import FAILURES, KILLS, MOST_POINTS, Interference, Trial, attempt
from tests.crash.commands import argv, begin, points_of
from tests.crash.healing import ways_to_heal
from tests.crash.scene import Done, Scene
from tests.crash.server import FAIL_ONCE, Fault

_ONCE = tuple(failure for failure in FAILURES if failure.how == FAIL_ONCE)
_OWN = re.compile(r"^\w+ /run(/|$)")
_ANY_NAME = re.compile(r"\.state-\w+")


@dataclass(frozen=True, slots=True)
class WayBack:
    """A failure that makes the command take back more than its own record."""

    at: int
    failure: Interference
    points: tuple[str, ...]
    """Those behind the failure."""


def of(scene: Scene, command: str, at: int) -> WayBack | None:
    """The way back of a command that fails at a point; None where it has none. The errors take turns."""
    failure = _ONCE[at % len(_ONCE)]
    done, _ = _run(scene, command, failure.faults(at))
    behind = tuple(_ANY_NAME.sub(".state-", point) for point in done.points[at:])
    if done.exit != 1 or all(_OWN.match(point) for point in behind):
        return None
    return WayBack(at, failure, behind)


def found(scene: Scene, command: str, *, first: int = 1, last: int = MOST_POINTS) -> Iterator[WayBack]:
    """The different ways back of a command; of those with the same points from the same state the first."""
    known = set()
    for at in range(first, min(len(points_of(scene, command)), last) + 1):
        if way := of(scene, command, at):
            _, seen = _run(scene, command, KILLS[0].faults(at), look=True)
            if (way.points, *seen.items()) not in known:
                known.add((way.points, *seen.items()))
                yield way


def _run(scene: Scene, command: str, faults: Sequence[Fault], *, look: bool = False) -> tuple[Done, dict[str, str]]:
    """A run from beginning to end, and where connections end after it."""
    begin(scene, command)
    done = scene.host(*argv(scene, command), faults=faults)
    seen = scene.seen() if look else {}
    scene.uninstall()
    return done, seen


def ways_back(
    scene: Scene, command: str, *, step: int = 1, first: int = 1, last: int = MOST_POINTS, turns: bool = False
) -> Iterator[Trial]:
    """Trials of a command: killed at every `step`th point of every way back, in each way, or in turns.

    `first` and `last` are about the failures.
    """
    for way in list(found(scene, command, first=first, last=last)):
        for later in range(1, len(way.points) + 1, step):
            ways = [(kill, healing) for kill in KILLS for healing in ways_to_heal(command, kill.how)]
            for kill, healing in [ways[(way.at + later // step) % len(ways)]] if turns or step > 1 else ways:
                interference = dataclasses.replace(way.failure, then=kill.how, later=later)
                trial = attempt(scene, command, interference, way.at, healing)
                if trial:
                    yield trial
