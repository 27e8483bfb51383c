"""Where those wait who may be a dial of another worker's, until that worker knows the ports of its dials (`Hops`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tpctl.relay.loop.loop import Loop

T = TypeVar("T")
_QUICK_SECONDS = 0.0005
"""A dial takes some 30 us, unless its worker was interrupted. As long, the loop comes round without a pause."""
_NAP_SECONDS = 0.001
"""Between looks from then on: on a busy machine, whoever has the worker's processor keeps it for milliseconds."""
PATIENCE_SECONDS = 0.05
"""Whoever has waited so long waits no longer, whatever is not known."""


class WaitingRoom(Generic[T]):
    """Calls `go_on` for everybody in turn, while the loop does other things."""

    def __init__(self, loop: Loop, go_on: Callable[[T], None], patience: float = PATIENCE_SECONDS) -> None:
        self._loop = loop
        self._patience = patience
        self._go_on = go_on
        self._waiting: dict[T, tuple[Callable[[], bool], float]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, guest: T, must_wait: Callable[[], bool]) -> None:
        """Wait as long as somebody must."""
        if not self._waiting:
            self._loop.later(0.0, self._look)
        self._waiting[guest] = must_wait, time.monotonic()

    def leave(self, guest: T) -> None:
        """Wait no more, for nothing."""
        self._waiting.pop(guest, None)

    def everybody(self) -> list[T]:
        """Those who wait."""
        return list(self._waiting)

    def _look(self) -> None:
        now = time.monotonic()
        longest = 0.0
        try:
            for guest, (must_wait, since) in list(self._waiting.items()):
                if now - since < self._patience and must_wait():
                    longest = max(longest, now - since)
                elif self._waiting.pop(guest, None) is not None:  # whoever went on before may have ended this one
                    self._go_on(guest)
        finally:
            if self._waiting:
                self._loop.later(0.0 if longest < _QUICK_SECONDS else _NAP_SECONDS, self._look)
