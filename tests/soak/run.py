"""The long run: what is done, in which order, and what comes of it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.plant import ENGINES, POLICIES, FaultError, Plant, plant
from tests.soak.samples import HEADING, Sample, Verdict, judge, take
from tests.soak.traffic import Seen

PAUSE_SECONDS = 1.5
"""Between two events, in which there is traffic alone."""
FEW = 9
"""Samples, below which nothing is judged."""


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)
    samples: list[Sample] = field(default_factory=list)
    halves: dict[str, list[Verdict]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seen = self.seen
        lines = [
            f"{self.seconds:.0f} s: " + ", ".join(f"{what} {count}" for what, count in sorted(self.events.items()))
        ]
        lines.append(
            f"{seen.connections} connections, {seen.lasting} that lasted, {seen.queries} queries, {seen.megabytes} MB: "
            f"{seen.lost} lost, {seen.misdirected} misdirected; {seen.excused} excused"
        )
        for name, verdicts in self.halves.items():
            lines += ["", f"{name:<34}{HEADING[34:]}", *map(str, verdicts)]
        lines += ["", *(f"FAULT: {fault}" for fault in self.faults)]
        return "\n".join([*lines, "NOT flawless" if self.faults else "nothing was lost, and nothing has grown"])


def soak(
    seconds: float,
    folder: Path,
    tell: Callable[[str], None] = lambda _line: None,
    engines: Sequence[str] = ENGINES,
    least: int = 0,
) -> Outcome:
    """Do everything in turn for so long, but at `least` so many things; `tell` gets a line about each round.

    The relay is replaced and killed in the first half alone: its successors are compared with each other there, and in
    the second half one process is with itself.
    """
    outcome = Outcome()
    middle = 0
    with plant(folder) as made:
        began = time.monotonic()
        made.install()
        applications = made.applications()
        try:
            events = _events(made, engines, lambda: time.monotonic() - began < seconds / 2)
            for number, (name, act) in enumerate(events):
                elapsed = time.monotonic() - began
                if elapsed > seconds and number >= least:
                    break
                _do(made, name, act, outcome)
                if elapsed <= seconds / 2:
                    middle = len(outcome.samples)
                if number % 10 == 0:
                    tell(f"{elapsed:6.0f} s  {name:<22}{outcome.samples[-1]}")
        finally:
            outcome.seen = applications.stop()
            outcome.seconds = time.monotonic() - began
        outcome.faults += [f"the relay: {complaint}" for complaint in made.relay.complaints()]
    _conclude(outcome, middle)
    return outcome


def _do(made: Plant, name: str, act: Callable[[], None], outcome: Outcome) -> None:
    outcome.events[name] += 1
    try:
        act()
        time.sleep(PAUSE_SECONDS)
        made.status()
    except FaultError as fault:
        outcome.faults.append(f"{name} under {made.engine}: {fault}")
        with made.window.opened():
            made.install()
    outcome.samples.append(take(made))


def _events(
    made: Plant, order: Sequence[str], relays_change: Callable[[], bool]
) -> Iterator[tuple[str, Callable[[], None]]]:
    policies = itertools.cycle([*range(1, len(POLICIES)), 0])
    engines = itertools.cycle([*order[1:], order[0]])

    def swap_policy() -> None:
        made.policy = next(policies)
        made.install()

    def swap_engine() -> None:
        made.engine = next(engines)
        made.install()

    def repair(damage: Callable[[], None]) -> None:
        with made.window.opened():
            damage()
            made.status(wanted=False)
            made.install()

    def reinstall() -> None:
        with made.window.opened():
            made.tpctl("uninstall")
            made.install()

    def crash() -> None:
        with made.window.opened():
            made.relay.crash()
            made.relay.start()

    def only_early(name: str, act: Callable[[], None]) -> tuple[str, Callable[[], None]]:
        return (name, act) if relays_change() else ("swap policy", swap_policy)

    while True:
        yield "swap policy", swap_policy
        yield "reload the relay", made.relay.reload
        yield "swap engine", swap_engine
        yield only_early("replace the relay", made.relay.replace)
        yield "rules removed", lambda: repair(made.remove_rules)
        yield "swap engine", swap_engine
        yield "rules added", lambda: repair(made.add_rules)
        yield "uninstall, install", reinstall
        yield only_early("kill the relay", crash)


def _conclude(outcome: Outcome, middle: int) -> None:
    seen = outcome.seen
    if seen.lost or seen.misdirected:
        outcome.faults.append(f"{seen.lost} connections were lost, {seen.misdirected} misdirected")
        outcome.faults += [f"{count} times: {reason}" for reason, count in seen.reasons.most_common(30)]
    parts = {"relays that follow each other": outcome.samples[:middle], "one relay": outcome.samples[middle:]}
    for name, samples in parts.items():
        if len(samples) < FEW:
            continue
        outcome.halves[name] = judge(samples)
        outcome.faults += [f"{name}: {one}" for one in outcome.halves[name] if one.grows]
