"""Many things that must each happen within the same time: no timer of their own, so that ten thousand cost nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from tpctl.relay.loop.loop import Loop

T = TypeVar("T")
_GRAIN = 16
"""Something may be late by this part of the time it has."""


class Deadlines(Generic[T]):
    """Things in the order in which they began, which is the order in which their time is over."""

    def __init__(self, loop: Loop, seconds: float, expire: Callable[[T], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._expire = expire
        self._begun: dict[T, float] = {}
        self._armed = False

    def add(self, thing: T) -> None:
        """Its time begins now. Zero seconds stand for ever."""
        if not self._seconds:
            return
        self._begun[thing] = time.monotonic()
        if not self._armed:
            self._armed = True
            self._loop.later(self._seconds, self._look)

    def discard(self, thing: T) -> None:
        """It has happened; harmless when it is not waited for."""
        self._begun.pop(thing, None)

    def _look(self) -> None:
        self._armed = False
        past = time.monotonic() - self._seconds
        for thing, begun in list(self._begun.items()):
            if begun > past:
                self._armed = True
                self._loop.later(max(begun - past, self._seconds / _GRAIN), self._look)
                return
            if self._begun.pop(thing, None) is None:  # the end of another one was the end of this one
                continue
            self._loop.attempt(partial(self._expire, thing))
