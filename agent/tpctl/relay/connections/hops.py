"""What the workers of a relay know of each other's dials: which there are, and how often each has gone through it."""

from __future__ import annotations

import mmap
import sys
from typing import NamedTuple

from tpctl.relay.loop.original_destination import Destination

_PLACES = 1 << 17
"""Four times the ports that Linux dials from: they are shared between destinations."""
_HOPS, _LINK = 0xFF, 0xFFFFFF00
UnderWay = tuple[tuple[int, int], ...]
"""Dials by the row of their worker, and how many that had begun by then."""


class Link(NamedTuple):
    """Both ends of a connection. Neither alone tells one from another: ports are shared between destinations."""

    host: str
    port: int
    destination: Destination


class Hops:
    """The dials of all workers, in memory that they inherit. Made before the workers are forked.

    A dial is known by a hash of its ends, 41 bits of it: hashes of texts are keyed, so nobody can choose one. A later
    dial may take the place of another, which then counts as a client's.

    connect() over the loopback interface may wake the worker that gets the connection before it returns, and with it
    the port. So while a dial has no port yet, its destination stands in the row of its worker, and whoever gets a
    connection for that destination waits for a moment (`waiting_room`).
    """

    __slots__ = ("_begun", "_dialling", "_numbers", "_own", "_under_way")

    def __init__(self, workers: int = 1) -> None:
        self._numbers = memoryview(mmap.mmap(-1, _PLACES * 4)).cast("I")
        self._dialling = mmap.mmap(-1, (workers + 1) * 8)
        self._under_way = memoryview(self._dialling).cast("q")
        self._begun = memoryview(mmap.mmap(-1, (workers + 1) * 8)).cast("q")
        self._own = 0

    def be(self, worker: int) -> None:
        """Write the row of this worker from now on."""
        self._own = worker

    def bury(self, worker: int) -> None:
        """A worker has died, and with it the dial that it was about to make."""
        self._under_way[worker] = 0

    def begin(self, destination: Destination) -> None:
        """A dial is about to be made."""
        self._begun[self._own] += 1
        self._under_way[self._own] = hash(destination)

    def made(self) -> None:
        """It has been made, and noted; or it could not be made."""
        self._under_way[self._own] = 0

    def note(self, link: Link, hops: int) -> None:
        """A dial that has gone through the relay so often has these ends."""
        key = hash(link)
        self._numbers[key % _PLACES] = _of_link(key) | hops + 1

    def forget(self, link: Link) -> None:
        """It has ended."""
        key = hash(link)
        if self._numbers[key % _PLACES] & _LINK == _of_link(key):
            self._numbers[key % _PLACES] = 0

    def of(self, link: Link) -> int:
        """How often a connection that was accepted may have gone through the relay; 0 for most clients'.

        Asked when nothing is `under_way` any more.
        """
        key = hash(link)
        found = self._numbers[key % _PLACES]
        return found & _HOPS if found and found & _LINK == _of_link(key) else 0

    def under_way(self, link: Link) -> UnderWay:
        """The dials that have no port yet, of which one may have made this connection; mostly none.

        Those that are begun later are none of a connection's that is there already.
        """
        target = hash(link.destination)
        # Asked before `of`: a dial is noted before it is made.
        if self._dialling.find(target.to_bytes(8, sys.byteorder, signed=True)) < 0 or self.of(link):
            return ()
        return tuple((row, self._begun[row]) for row, one in enumerate(self._under_way) if one == target)

    def are_under_way(self, dials: UnderWay, link: Link) -> bool:
        """Whether they still are, and none of them is known to be the one with these ends."""
        target = hash(link.destination)
        is_any = any(self._under_way[row] == target and self._begun[row] == begun for row, begun in dials)
        return is_any and not self.of(link)


def _of_link(key: int) -> int:
    """What is kept of a hash, beside its place. Workers are forked, so that hash() is the same for all."""
    return key >> 24 & _LINK
