"""Every point of every command: interfere there, judge by connections what the host is in, and heal it.

A command's points are counted in an undisturbed run first. It is then run again from the same beginning for each of
them, until a run is over before the point comes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.crash.commands import LONG, SHORT, argv, awaits_wrongly, begin, judged, left_behind, points_of
from tests.crash.healing import WAIT, healed, ways_to_heal
from tests.crash.scene import Done, Scene
from tests.crash.server import FAIL_FROM, FAIL_ONCE, HANG, KILL_ALL, KILL_CALLER, Fault

_TRACE = ("Traceback", "internal error")
_GOES_FORWARD = (
    "no traffic is redirected",
    "was installed before is carried out again",
    "was taken back; installed now",
)
"""An uninstall and a way back that fail go on, and the way back of a repair is the policy on record."""
_SPEAKS_OF_STATE = (
    "as it was", "as they were", "as before", "rolled back", "othing was changed", "othing was removed",
    "othing was written", "tpctl status", "othing was touched", "taken back",
    *_GOES_FORWARD,
)  # fmt: skip
"""A message about a failure says in some such words what the host's state is now."""
MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Interference:
    """What is done at a point, and what then at a later one."""

    how: str
    errno: int = 0
    label: str = ""
    then: str = ""
    """What is done next, so many points `later`."""
    later: int = 0

    def __str__(self) -> str:
        then = f", then {self.then} {self.later} later" if self.then else ""
        return f"{self.label or self.how}{then}"

    def faults(self, at: int) -> tuple[Fault, ...]:
        """For the server."""
        first = Fault(self.how, at, self.errno)
        return (first, Fault(self.then, at + self.later)) if self.then else (first,)

    @property
    def kills(self) -> bool:
        """Whether the command, or what it has started, is killed."""
        return {self.how, self.then} & {KILL_CALLER, KILL_ALL} != set()


KILLS = (Interference(KILL_CALLER), Interference(KILL_ALL))
FAILURES = (
    *(
        Interference(FAIL_ONCE, number, f"{errno.errorcode[number]} once")
        for number in (errno.ENOSPC, errno.EPERM, errno.EIO, errno.EBUSY, errno.ENOMEM)
    ),
    Interference(FAIL_FROM, errno.EROFS, "EROFS for files from there"),
)
HANGS = (Interference(HANG),)
PATIENCE_SECONDS = 10.0
"""How long a command waits in this case for what it started."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One interference at one point, and what came of it."""

    flavour: str
    command: str
    interference: Interference
    at: int
    point: str
    state: str
    """"old", "new" or "between" (every connection ends as before or as after); or "wrong"."""
    detail: str = ""
    """The connections that are between or wrong."""
    faults: tuple[str, ...] = ()
    """What is not as it must be; the trial is stuck with any."""
    exit: int = 0

    def __str__(self) -> str:
        where = f"{self.flavour}: {self.command}: {self.interference} at {self.at} ({self.point}): {self.state}"
        return "\n    ".join([where, *([self.detail] if self.detail else []), *self.faults])


@dataclass(slots=True)
class Figures:
    """A row of the table."""

    points: int = 0
    old: int = 0
    new: int = 0
    between: int = 0
    healed: int = 0
    stuck: int = 0
    trials: list[Trial] = field(default_factory=list)

    def add(self, trial: Trial) -> None:
        """Count one trial."""
        self.trials.append(trial)
        self.points += 1
        self.old += trial.state == "old"
        self.new += trial.state == "new"
        self.between += trial.state == "between"
        self.healed += not trial.faults
        self.stuck += bool(trial.faults)


def attempt(scene: Scene, command: str, interference: Interference, at: int, healing: str) -> Trial | None:
    """One trial, with the host bare before and after; None when the run was over before the point."""
    within = SHORT if healing == WAIT else LONG
    begin(scene, command, within)
    patience = PATIENCE_SECONDS if interference.how == HANG else None
    done = scene.host(*argv(scene, command, within), faults=interference.faults(at), patience=patience)
    if done.hit is None:
        scene.uninstall()
        scene.host.leave(0.0)
        return None
    state, detail = judged(scene, command)
    faults = [*_said_wrong(done, interference), *_state_wrong(done, interference, state)]
    faults += [*awaits_wrongly(scene, command, done), *left_behind(scene, command, done)]
    if state == "wrong":
        faults.append("connections end where neither the old nor the new policy says")
    faults += healed(scene, command, healing)
    return Trial(scene.flavour, command, interference, at, done.hit, state, detail, tuple(faults), done.exit)


def _said_wrong(done: Done, interference: Interference) -> Iterator[str]:
    """What a command that was left alive must not say, or has to."""
    if done.exit < 0:
        if done.exit == -999:
            yield "it did not end by itself"
        elif not interference.kills:
            yield f"it was ended by signal {-done.exit}"
        return
    if any(trace in done.err for trace in _TRACE):
        yield f"it says: {done.err.strip()}"
    if done.exit not in (0, 1, 2):
        yield f"exit {done.exit}: {done.err.strip()}"
    if done.exit == 1 and not any(words in done.err for words in _SPEAKS_OF_STATE):
        yield f"exit {done.exit}, and not a word on the host's state: {done.err.strip()}"


def _state_wrong(done: Done, interference: Interference, state: str) -> Iterator[str]:
    """A command that could end has to leave the host in one state, the one its exit code stands for."""
    twice = interference.how == FAIL_FROM or interference.then
    if done.exit < 0 or (done.exit and "rollback failed too" in done.err and twice):
        return
    if done.exit == 0 and state != "new":
        yield f"exit 0, but connections see the state {state}"
    if done.exit == 2 and state != "old":
        yield f"exit 2 means that nothing was changed, but connections see the state {state}: {done.err.strip()}"
    if done.exit == 1 and state != "old" and not any(words in done.err for words in _GOES_FORWARD):
        yield f"exit 1, but connections see the state {state}: {done.err.strip()}"


def campaign(
    scene: Scene,
    command: str,
    interferences: Sequence[Interference],
    *,
    step: int = 1,
    first: int = 1,
    last: int = MOST_POINTS,
    turns: bool = False,
    healings: Sequence[str] = (),
) -> Iterator[Trial]:
    """Trials of a command: at every `step`th point from `first` to `last`, each interference with each healing.

    Without `healings` these are all that there are for the command. With a step, or if told so, the ways to interfere
    and to heal take turns instead. Only what tpctl started can hang.
    """
    points = points_of(scene, command)
    ways = [(one, healing) for one in interferences for healing in healings or ways_to_heal(command, one.how)]
    at = first
    # A disturbed run can have more points than an undisturbed one: those of its rollback are tried by failing calls.
    while at <= min(len(points), last):
        for interference, healing in [ways[(at // step) % len(ways)]] if turns or step > 1 else ways:
            if interference.how == HANG and not points[at - 1].endswith(")"):
                continue
            trial = attempt(scene, command, interference, at, healing)
            if trial:
                yield trial
        at += step


def summary(trials: Sequence[Trial]) -> Figures:
    """The figures of some trials."""
    figures = Figures()
    for trial in trials:
        figures.add(trial)
    return figures
