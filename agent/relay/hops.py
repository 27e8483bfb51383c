"""How often a connection has gone through the relay: what keeps a loop through several workers short."""

from __future__ import annotations

import mmap

from agent.relay.original_destination import Destination

_PORTS = 1 << 16


class Hops:
    """What all workers know of each other's dials, in memory that they inherit; one byte for each source port.

    connect() over the loopback interface may wake the worker that gets the connection before it returns, and with it
    the port. So while a dial has no port yet, it stands under its destination.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 2 * _PORTS))

    def begin(self, destination: Destination, hops: int) -> None:
        """A dial that has gone through the relay so often is about to be made."""
        self._numbers[_place(destination)] = hops + 1

    def made(self, destination: Destination, hops: int) -> None:
        """It has been made, and noted under its port; or it could not be made. The next one may be on its way."""
        place = _place(destination)
        if self._numbers[place] == hops + 1:
            self._numbers[place] = 0

    def note(self, port: int, hops: int) -> None:
        """A dial comes from this port."""
        self._numbers[port] = hops + 1

    def forget(self, port: int) -> None:
        """It has ended."""
        self._numbers[port] = 0

    def of(self, port: int, destination: Destination) -> int:
        """How often a connection that was accepted may have gone through the relay; 0 for most clients'."""
        return self._numbers[port] or self._numbers[_place(destination)]


def _place(destination: Destination) -> int:
    """Workers are forked, so that hash() is the same for all."""
    return _PORTS + hash(destination) % _PORTS
