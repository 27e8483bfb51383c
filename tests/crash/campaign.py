"""Every point of every command: interfere there, judge by connections what the host is in, and heal it.

A command's points are counted in an undisturbed run first. It is then run again from the same beginning for each of
them, until a run is over before the point comes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.crash.scene import FAIL_FROM, FAIL_ONCE, HANG, KILL_ALL, KILL_CALLER, Done, Scene

COMMANDS = ("install", "swap", "uninstall", "apply")
BEGINNING = {"install": "none", "swap": "old", "uninstall": "old", "apply": "none"}
END = {"install": "new", "swap": "new", "uninstall": "none", "apply": "old"}
HEALINGS = ("install", "uninstall")
_TRACE = ("Traceback", "internal error")
_GOES_FORWARD = ("no traffic is redirected", "was installed before is carried out again")
"""An uninstall that fails goes on, and the way back of a repair is the policy on record."""
_SPEAKS_OF_STATE = (
    "as it was", "as they were", "as before", "rolled back", "othing was changed", "othing was removed",
    "othing was written", "tpctl status", "othing was touched", "taken back",
    *_GOES_FORWARD,
)  # fmt: skip
"""A message about a failure says in some such words what the host's state is now."""
MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Interference:
    """What is done at a point."""

    how: str
    errno: int = 0
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.how


KILLS = (Interference(KILL_CALLER), Interference(KILL_ALL))
FAILURES = (
    *(
        Interference(FAIL_ONCE, number, f"{errno.errorcode[number]} once")
        for number in (errno.ENOSPC, errno.EPERM, errno.EIO, errno.EBUSY, errno.ENOMEM)
    ),
    Interference(FAIL_FROM, errno.EROFS, "EROFS for files from there"),
)
HANGS = (Interference(HANG),)
PATIENCE_SECONDS = 5.0
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


def argv(scene: Scene, command: str) -> tuple[str, ...]:
    """What is typed."""
    return scene.argv("new") if command in ("install", "swap") else (command,)


def begin(scene: Scene, command: str) -> None:
    """Bring the host, on which nothing is installed, to where the command begins."""
    if command in ("swap", "uninstall", "apply"):
        scene.install("old")
    if command == "apply":
        scene.lose_rules()
    scene.forget()


def points_of(scene: Scene, command: str) -> tuple[str, ...]:
    """The points of an undisturbed run."""
    begin(scene, command)
    done = scene.host.ok(*argv(scene, command))
    scene.uninstall()
    return done.points


def attempt(scene: Scene, command: str, interference: Interference, at: int, healing: str) -> Trial | None:
    """One trial, with the host bare before and after; None when the run was over before the point."""
    begin(scene, command)
    patience = PATIENCE_SECONDS if interference.how == HANG else None
    done = scene.host(*argv(scene, command), how=interference.how, at=at, errno=interference.errno, patience=patience)
    if done.hit is None:
        scene.uninstall()
        return None
    state, detail = judged(scene, command)
    faults = [*_said_wrong(done, interference), *_state_wrong(done, interference, state)]
    if state == "wrong":
        faults.append("connections end where neither the old nor the new policy says")
    faults += _healed(scene, command, healing)
    return Trial(scene.flavour, command, interference, at, done.hit, state, detail, tuple(faults), done.exit)


def judged(scene: Scene, command: str) -> tuple[str, str]:
    """The state that connections see, and those that are not as in the old one."""
    seen = scene.seen()
    old, new = scene.expected(BEGINNING[command]), scene.expected(END[command])
    if seen == old:
        return "old", ""
    if seen == new:
        return "new", ""
    wrong = {name: seat for name, seat in seen.items() if seat not in (old[name], new[name])}
    if wrong:
        return "wrong", ", ".join(f"{name}: {seat}" for name, seat in wrong.items())
    return "between", "as after already: " + ", ".join(n for n in seen if seen[n] == new[n] != old[n])


def _said_wrong(done: Done, interference: Interference) -> Iterator[str]:
    """What a command that was left alive must not say, or has to."""
    if done.exit < 0:
        if done.exit == -999:
            yield "it did not end by itself"
        elif interference.how not in (KILL_CALLER, KILL_ALL):
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
    if done.exit < 0 or (done.exit and "rollback failed too" in done.err and interference.how == FAIL_FROM):
        return
    if done.exit == 0 and state != "new":
        yield f"exit 0, but connections see the state {state}"
    if done.exit == 2 and state != "old":
        yield f"exit 2 means that nothing was changed, but connections see the state {state}: {done.err.strip()}"
    if done.exit == 1 and state != "old" and not any(words in done.err for words in _GOES_FORWARD):
        yield f"exit 1, but connections see the state {state}: {done.err.strip()}"


def _healed(scene: Scene, command: str, healing: str) -> Iterator[str]:
    """Heal by the next command; then leave the host bare for the next trial."""
    if healing == "install":
        name = "new" if command in ("install", "swap") else "old"
        done = scene.host(*scene.argv(name))
        if done.exit != 0:
            yield f"the next install fails: {done}"
        elif (seen := scene.seen()) != scene.expected(name):
            yield f"after the next install connections end elsewhere: {_difference(seen, scene.expected(name))}"
        elif complaints := scene.complaints():
            yield f"after the next install `tpctl status` finds {complaints}"
        yield from scene.litter()
    done = scene.host("uninstall")
    if done.exit != 0:
        yield f"the next uninstall fails: {done}"
        scene.host("uninstall")
    held = scene.held()
    if held != scene.base:
        yield f"the next uninstall leaves: {_difference(held, scene.base)}"
        scene.mend(held)


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    lines = [f"{name}: {text!r}" for name, text in found.items() if wanted.get(name) != text]
    return "\n      ".join([*lines, *(f"missing: {name}" for name in wanted if name not in found)])[:3000]


def campaign(
    scene: Scene,
    command: str,
    interferences: Sequence[Interference],
    *,
    step: int = 1,
    first: int = 1,
    last: int = MOST_POINTS,
    turns: bool = False,
    healings: Sequence[str] = HEALINGS,
) -> Iterator[Trial]:
    """Trials of a command: at every `step`th point from `first` to `last`, each interference with each healing.

    With a step, or if told so, the ways to interfere and to heal take turns instead. Only what tpctl started can hang.
    """
    points = points_of(scene, command)
    ways = [(one, healing) for one in interferences for healing in healings]
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
