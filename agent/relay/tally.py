"""Numbers that all workers share, in memory that they inherit: each writes its own row, everybody may read the sum."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

from agent.relay.check import MAX_LISTENERS
from agent.relay.clients import Clients
from agent.relay.connection import Ending
from agent.relay.hops import Hops
from agent.relay.route import Refusal

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
WIDTH = BEAT + 1
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
        self._base = 0
        self._own_buckets = 0

    def be(self, worker: int) -> None:
        """Write the row of this worker from now on, from zero."""
        self.hops.be(worker)
        self.clients.be(worker)
        self._base = worker * _ROW
        self._own_buckets = worker * _BUCKETS
        self._sources = {}

    def add(self, slot: int, counter: int, amount: int = 1) -> None:
        """Add to a counter of a listener. `amount` may be negative for what goes up and down."""
        self._numbers[self._base + slot * WIDTH + counter] += amount

    def put(self, slot: int, counter: int, value: int) -> None:
        """Set a counter of this worker."""
        self._numbers[self._base + slot * WIDTH + counter] = value

    def total(self, slot: int, counter: int) -> int:
        """The sum of a counter over all workers."""
        return sum(self._numbers[slot * WIDTH + counter :: _ROW])

    def beat(self) -> None:
        """This worker lives."""
        self.put(WORKER, BEAT, time.monotonic_ns())

    def rest(self) -> None:
        """This worker ends: nobody waits for it any more."""
        self.put(WORKER, BEAT, 0)

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
