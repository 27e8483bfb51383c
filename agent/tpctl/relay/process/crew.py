"""What a supervisor knows of its workers: who hangs, who has which state, and when a dead one is replaced. Pure."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LOOK_SECONDS = 2.0
"""How often workers show that they live, and how often that is looked at."""
HANGING_LOOKS = 5
"""A worker that has shown nothing between so many looks hangs. Looks, not seconds, are counted: a machine that was
suspended, or a frozen control group, has stopped everybody's clock alike."""
STEADY_SECONDS = 60.0
"""Whoever has lived for so long dies for the first time."""
_LONGEST_DELAY = 30.0
MOST_DEATHS = 5
"""In a row, of a worker that never got steady. If nobody else is left by then, the relay gives up."""


@dataclass(slots=True)
class Member:
    """A worker that runs."""

    number: int
    channel: socket.socket
    since: float
    """When it was started, by time.monotonic()."""
    beat: int
    """What it last showed; at first, what was there before it began."""
    silent_looks: int = 0
    has_begun: bool = False
    """Whether it has ever shown that it lives: to begin, with a large DNS zone, may take long."""
    sent: int = 0
    taken: int = 0
    """How many states it was sent, and to how many of them it has answered."""

    def look(self, beat: int, *, is_ending: bool = False) -> bool:
        """Whether it hangs, by what it has shown by now.

        At the end of the relay, which waits for it, so may one that has not begun, and that nobody misses.
        """
        if beat != self.beat:
            self.beat, self.silent_looks, self.has_begun = beat, 0, True
        elif self.has_begun or is_ending:
            self.silent_looks += 1
        return self.silent_looks >= HANGING_LOOKS


class Reloads:
    """Those that some worker has not taken yet, in their order."""

    def __init__(self) -> None:
        self._waiting: list[tuple[dict[int, int], Callable[[], None]]] = []

    def begin(self, workers: Mapping[int, Member], done: Callable[[], None]) -> None:
        """Call `done` when the workers, by their pids, have taken what they were sent, or have gone.

        Who takes the place of one that has gone begins with the last state.
        """
        self._waiting.append(({pid: worker.sent for pid, worker in workers.items()}, done))
        self.look(workers)

    def look(self, workers: Mapping[int, Member]) -> None:
        """A worker has answered, or has gone."""
        while self._waiting:
            sent, done = self._waiting[0]
            if any(pid in workers and workers[pid].taken < number for pid, number in sent.items()):
                return
            del self._waiting[0]
            done()


@dataclass(slots=True)
class Deaths:
    """How often the workers of each number have died before they were steady."""

    in_a_row: dict[int, int] = field(default_factory=dict)

    def delay(self, number: int, lived: float) -> float:
        """In how many seconds a worker that has lived for so long is replaced.

        At once, for the first time; then after one second, two, four and so on.

        >>> deaths = Deaths()
        >>> [deaths.delay(0, lived) for lived in (1, 1, 1, 1, 90, 1)]
        [0.0, 1.0, 2.0, 4.0, 0.0, 1.0]
        """
        before = 0 if lived >= STEADY_SECONDS else self.in_a_row.get(number, 0)
        self.in_a_row[number] = before + 1
        return min(_LONGEST_DELAY, 2.0 ** (before - 1)) if before else 0.0

    def are_too_many(self, number: int) -> bool:
        """Whether there is no sense in yet another one."""
        return self.in_a_row.get(number, 0) > MOST_DEATHS
