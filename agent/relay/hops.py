"""How often a connection has gone through the relay: what keeps a loop through several workers short."""

from __future__ import annotations

import mmap
import os

from agent.relay.original_destination import Destination

_PORTS = 1 << 16
_HOPS, _DESTINATION = 0xFF, 0xFFFFFF00
_PATIENCE = 100
"""Looks at another worker's dial that has no port yet, which takes some 30 us unless that worker was interrupted."""


class Hops:
    """What all workers know of each other's dials, in memory that they inherit: for each source port the latest one.

    A number stands beside a hash of the destination. With thousands of dials, many a client has the port of one of
    them, and would inherit its number.

    connect() over the loopback interface may wake the worker that gets the connection before it returns, and with it
    the port. So while a dial has no port yet, its destination is noted, and whoever gets a connection for that
    destination waits for a moment.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 2 * _PORTS * 4)).cast("I")

    def begin(self, destination: Destination, hops: int) -> None:
        """A dial that has gone through the relay so often is about to be made."""
        self._numbers[_place(destination)] = hops + 1

    def made(self, destination: Destination, hops: int) -> None:
        """It has been made, and noted under its port; or it could not be made. The next one may be on its way."""
        place = _place(destination)
        if self._numbers[place] == hops + 1:
            self._numbers[place] = 0

    def note(self, port: int, destination: Destination, hops: int) -> None:
        """A dial comes from this port."""
        self._numbers[port] = hash(destination) & _DESTINATION | hops + 1

    def forget(self, port: int) -> None:
        """It has ended."""
        self._numbers[port] = 0

    def of(self, port: int, destination: Destination) -> int:
        """How often a connection that was accepted may have gone through the relay; 0 for most clients'."""
        place = _place(destination)
        for _ in range(_PATIENCE):
            found = self._numbers[port]
            if found and (found ^ hash(destination)) & _DESTINATION == 0:
                return found & _HOPS
            if not self._numbers[place]:
                break
            os.sched_yield()
        return 0


def _place(destination: Destination) -> int:
    """Workers are forked, so that hash() is the same for all."""
    return _PORTS + hash(destination) % _PORTS
