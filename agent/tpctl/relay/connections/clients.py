"""Who has most of the relay's connections: told only while somebody asks, so that it costs nothing otherwise."""

from __future__ import annotations

import json
import mmap
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

MOST = 8
"""Clients that are shown for their connections, and as many for their bytes."""
_TOLD = 16
"""The same of each worker, so that whom every worker has a few connections of is found all the same."""
_ROW = 8192
"""Bytes for each worker: 32 clients whose texts are as long as can be, and numbers of 20 digits."""
_HEAD = struct.Struct("=IId")
"""Length and CRC-32 of what follows, and when it was written, by time.monotonic()."""
_LATELY_SECONDS = 10.0


class Client(NamedTuple):
    """The connections that a client has at this moment, and the bytes that have moved on them."""

    connections: int
    sent: int
    """To upstreams."""
    received: int


class Clients:
    """What all workers tell, in memory that they inherit. Made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self._rows = memoryview(mmap.mmap(-1, (workers + 1) * _ROW))
        self._asked = memoryview(mmap.mmap(-1, 8)).cast("d")
        self._own = 0

    def be(self, worker: int) -> None:
        """Write the row of this worker from now on."""
        self._own = worker * _ROW

    def ask(self) -> None:
        """Somebody wants to know: let the workers tell, for some time."""
        self._asked[0] = time.monotonic()

    def are_asked_for(self) -> bool:
        """Whether anybody has asked lately."""
        return bool(self._asked[0]) and time.monotonic() - self._asked[0] < _LATELY_SECONDS

    def tell(self, found: Mapping[str, Client]) -> None:
        """The clients of this worker."""
        data = json.dumps(most(found, _TOLD)).encode()
        begin = self._own + _HEAD.size
        self._rows[begin : begin + len(data)] = data
        _HEAD.pack_into(self._rows, self._own, len(data), zlib.crc32(data), time.monotonic())

    def told(self) -> dict[str, Client]:
        """Those of all workers who have most. One that is just writing is left out."""
        rows = (self._told_by(at) for at in range(0, len(self._rows), _ROW))
        return most(total(part for row in rows for part in row.items()), MOST)

    def _told_by(self, at: int) -> dict[str, Client]:
        length, checksum, since = _HEAD.unpack_from(self._rows, at)
        data = bytes(self._rows[at + _HEAD.size : at + _HEAD.size + min(length, _ROW)])
        if not length or zlib.crc32(data) != checksum or time.monotonic() - since > _LATELY_SECONDS:
            return {}
        return {name: Client(*numbers) for name, numbers in json.loads(data).items()}


def total(parts: Iterable[tuple[str, tuple[int, int, int]]]) -> dict[str, Client]:
    """The sums by client.

    >>> total([("a", (1, 2, 3)), ("a", (1, 0, 0)), ("b", (1, 1, 1))])
    {'a': Client(connections=2, sent=2, received=3), 'b': Client(connections=1, sent=1, received=1)}
    """
    sums: dict[str, list[int]] = {}
    for name, (connections, sent, received) in parts:
        known = sums.get(name)
        if known is None:
            sums[name] = [connections, sent, received]
        else:
            known[0] += connections
            known[1] += sent
            known[2] += received
    return {name: Client(*numbers) for name, numbers in sums.items()}


def most(found: Mapping[str, Client], count: int) -> dict[str, Client]:
    """Those with most connections, and those with most bytes, so many of each; the most connections first.

    >>> list(most({"a": Client(1, 9, 9), "b": Client(3, 0, 0), "c": Client(2, 0, 0)}, 1))
    ['b', 'a']
    """
    by_bytes = sorted(found.items(), key=lambda row: (-row[1].sent - row[1].received, row[0]))[:count]
    by_connections = sorted(found.items(), key=lambda row: (-row[1].connections, row[0]))[:count]
    chosen = dict(by_connections + by_bytes)
    return dict(sorted(chosen.items(), key=lambda row: (-row[1].connections, -row[1].sent - row[1].received, row[0])))
