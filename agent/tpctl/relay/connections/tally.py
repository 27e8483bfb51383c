"""Numbers that all workers share, in memory that they inherit: each writes its own row, everybody may read the sum."""

from __future__ import annotations

import mmap
import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from tpctl.relay.connections.clients import Clients
from tpctl.relay.connections.hops import Hops
from tpctl.relay.connections.route import Refusal
from tpctl.relay.connections.states import Ending
from tpctl.relay.settings.check import MAX_LISTENERS

ACCEPTED, ACTIVE, SENT, RECEIVED, BROUGHT_BACK = range(5)
"""Of a listener: connections accepted so far, connections now, bytes to upstreams, bytes to clients, and connections
that were the relay's own dials."""
ENDED = {ending: number for number, ending in enumerate(Ending, BROUGHT_BACK + 1)}
"""Connections by the reason of their end."""
REFUSED = {refusal: number for number, refusal in enumerate(Refusal, BROUGHT_BACK + 1 + len(Ending))}
"""Connections by the reason of their refusal."""
ACCELERATED, TAKEN_BACK = range(
    BROUGHT_BACK + 1 + len(Ending) + len(Refusal), BROUGHT_BACK + 3 + len(Ending) + len(Refusal)
)
"""In the slot `WORKER`: streams that went over to the kernel, and those of them that were taken back."""
BEAT = TAKEN_BACK + 1
"""In the slot `WORKER`: when the worker last showed that it lives, by time.monotonic_ns(); 0: nobody waits for that."""
FAILURES, DROPPED_LINES = BEAT + 1, BEAT + 2
"""In the slot `WORKER`: errors that nobody expected, and lines that the log could not take."""


class Histogram(NamedTuple):
    """Counters of how often something took how long: one for each bound, one for what is longer, and the sum."""

    first: int
    bounds: tuple[float, ...]
    """Seconds; what takes exactly so long counts there, as `le` of Prometheus says."""

    @property
    def longer(self) -> int:
        """The counter of what is beyond the last bound."""
        return self.first + len(self.bounds)

    @property
    def sum(self) -> int:
        """The counter of the whole time, in microseconds."""
        return self.longer + 1


CONNECT = Histogram(
    DROPPED_LINES + 1, (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)
"""Of a listener: from the first dial to an upstream that is reached."""
LENGTH = Histogram(CONNECT.sum + 1, (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0))
"""Of a listener: from a client that is accepted to the end of its connection."""
WIDTH = LENGTH.sum + 1
WORKER = MAX_LISTENERS
"""The slot of what belongs to no listener: there ACTIVE is over all listeners, and the rest has names of its own."""
PAUSES, RELOADS, FAILED_RELOADS, DRAINING, DNS = ACCEPTED, SENT, RECEIVED, BROUGHT_BACK, BROUGHT_BACK + 1
"""In the slot `WORKER`: pauses of accepting, configurations taken into use and refused, whether the worker accepts no
more, the first counter of DNS."""

_BUCKETS = 1 << 18
_ROW = (MAX_LISTENERS + 1) * WIDTH


class Tally:
    """Counters by listener, and the connections of each source. Made before the workers are forked.

    There is a row more than workers, for the supervisor.
    """

    def __init__(self, workers: int) -> None:
        self.since = time.time()
        """When the relay began to count."""
        self._workers = workers
        self._numbers = memoryview(mmap.mmap(-1, (workers + 1) * _ROW * 8)).cast("Q")
        self._buckets = memoryview(mmap.mmap(-1, workers * _BUCKETS * 4)).cast("I")
        self.hops = Hops(workers)
        self.clients = Clients(workers)
        self._sources: dict[tuple[int, str], int] = {}
        self._begun = [0] * WIDTH
        self._base = 0
        self._own_buckets = 0

    def be(self, worker: int) -> None:
        """Write the row of this worker from now on. Counters go on from where a predecessor has left them."""
        self.hops.be(worker)
        self.clients.be(worker)
        self._base = worker * _ROW
        self._own_buckets = worker * _BUCKETS
        self._sources = {}
        begin = self._base + WORKER * WIDTH
        self._begun = list(self._numbers[begin : begin + WIDTH])

    def bury(self, worker: int) -> None:
        """Forget what a worker that has died had at that moment: its connections, its dials, its beat."""
        base = worker * _ROW
        for slot in range(MAX_LISTENERS + 1):
            self._numbers[base + slot * WIDTH + ACTIVE] = 0
        for counter in (DRAINING, BEAT):
            self._numbers[base + WORKER * WIDTH + counter] = 0
        self._buckets[worker * _BUCKETS : (worker + 1) * _BUCKETS] = memoryview(bytes(_BUCKETS * 4)).cast("I")
        self.hops.bury(worker)

    def add(self, slot: int, counter: int, amount: int = 1) -> None:
        """Add to a counter of a listener. `amount` may be negative for what goes up and down."""
        self._numbers[self._base + slot * WIDTH + counter] += amount

    def put(self, slot: int, counter: int, value: int) -> None:
        """Set a counter of this worker."""
        self._numbers[self._base + slot * WIDTH + counter] = value

    def count(self, counter: int, total: int) -> None:
        """Set a counter of the slot `WORKER` to what this worker has counted by itself since it began."""
        self.put(WORKER, counter, self._begun[counter] + total)

    def observe(self, slot: int, histogram: Histogram, seconds: float) -> None:
        """Count how long something took."""
        self.add(slot, histogram.first + bisect_left(histogram.bounds, seconds))
        self.add(slot, histogram.sum, int(seconds * 1_000_000))

    def total(self, slot: int, counter: int) -> int:
        """The sum of a counter over all workers."""
        return sum(self._numbers[slot * WIDTH + counter :: _ROW])

    def beat(self) -> None:
        """This worker lives."""
        self.put(WORKER, BEAT, time.monotonic_ns())

    def rest(self) -> None:
        """This worker ends: nobody waits for it any more."""
        self.put(WORKER, BEAT, 0)

    def beat_of(self, worker: int) -> int:
        """What a worker has shown last."""
        return self._numbers[worker * _ROW + WORKER * WIDTH + BEAT]

    def silence(self) -> float:
        """For how many seconds a worker has not shown that it lives: the longest time of all."""
        beats = self._numbers[WORKER * WIDTH + BEAT :: _ROW]
        return max(((time.monotonic_ns() - beat) / 1e9 for beat in beats if beat), default=0.0)

    def row(self, slot: int) -> Sequence[int]:
        """The sums of all counters of a slot."""
        return [self.total(slot, counter) for counter in range(WIDTH)]

    def enter(self, slot: int, source: str) -> None:
        """A source has one connection more."""
        key = (slot, source)
        self._sources[key] = self._sources.get(key, 0) + 1
        if self._workers > 1:
            self._buckets[self._own_buckets + hash(key) % _BUCKETS] += 1

    def leave(self, slot: int, source: str) -> None:
        """A source has one connection less."""
        key = (slot, source)
        left = self._sources[key] - 1
        if left:
            self._sources[key] = left
        else:
            del self._sources[key]
        if self._workers > 1:
            self._buckets[self._own_buckets + hash(key) % _BUCKETS] -= 1

    def connections_of(self, slot: int, source: str) -> int:
        """The connections of a source at this moment.

        Exact for this worker. For the others it is that of a bucket, which a few sources may share by chance; hashes
        of texts are keyed, so nobody can choose with whom, and they are the same in all workers because those were
        forked from one process.
        """
        key = (slot, source)
        own = self._sources.get(key, 0)
        if self._workers == 1:
            return own
        bucket = hash(key) % _BUCKETS
        return own + sum(self._buckets[bucket::_BUCKETS]) - self._buckets[self._own_buckets + bucket]
