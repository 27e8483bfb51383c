"""Who waits for an answer over UDP, by whose they are, so that one client's slow names cost nobody else an answer."""

from __future__ import annotations

import socket
from typing import Generic, NamedTuple, TypeVar

from tpctl.relay.loop import packet_info
from tpctl.relay.loop.shares import Shares

Q = TypeVar("Q")

OWN, OF_OTHERS = range(2)
"""Clients on this host, and on other hosts."""
MAX_PENDING = 1024
"""Clients that wait, in one worker."""
KEPT = {OWN: MAX_PENDING // 2, OF_OTHERS: MAX_PENDING // 4}
"""Of these places, so many are for nobody else."""


class Waiting(NamedTuple):
    """A client that waits for an answer."""

    listener: socket.socket
    client: tuple[str, int]
    ancillary: tuple[packet_info.Ancillary, ...]
    identifier: int
    kind: int
    """OWN or OF_OTHERS."""


class WaitingRoom(Generic[Q]):
    """The clients that wait, each with its query."""

    def __init__(self) -> None:
        self._places = Shares(MAX_PENDING, (KEPT[OWN], KEPT[OF_OTHERS]))
        self._sources: tuple[dict[str, dict[tuple[Waiting, Q], None]], ...] = ({}, {})
        """By kind and by address; each in the order in which it came.

        A client may have several queries under one id and from one port at once.
        """
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, one: Waiting, query: Q) -> bool:
        """Let one wait; whether there was room."""
        if not self._places.take(one.kind):
            return False
        sources = self._sources[one.kind]
        source = sources.get(one.client[0])
        if source is None:
            sources[one.client[0]] = {(one, query): None}
        else:
            source[one, query] = None
        self._count += 1
        return True

    def leave(self, one: Waiting, query: Q) -> None:
        """It waits for this query no more."""
        sources = self._sources[one.kind]
        source = sources[one.client[0]]
        del source[one, query]
        if not source:
            del sources[one.client[0]]
        self._places.give(one.kind)
        self._count -= 1

    def in_the_way(self, newcomer: Waiting) -> tuple[Waiting, Q] | None:
        """Whom to send away so that a newcomer of the same kind has room, with its query.

        The one that has waited for longest, of the address that has most. None unless that has more than the newcomer's
        would have then.
        """
        sources = self._sources[newcomer.kind]
        most = max(sources.values(), key=len, default=None)
        if most is None or len(most) < len(sources.get(newcomer.client[0], ())) + 2:
            return None
        return next(iter(most))
