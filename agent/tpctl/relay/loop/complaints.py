"""Log lines that anybody on the network could cause any number of times: one a period, with a count of the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

PERIOD_SECONDS = 10.0


class Complaints:
    """Warns at most once a period about each subject."""

    def __init__(self, log: FilteringBoundLogger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._last: dict[str, float] = {}
        self._silenced: dict[str, int] = {}

    def warn(self, subject: str, **details: object) -> None:
        """Log a warning; `subject` is one of a fixed few texts."""
        now = self._clock()
        if now - self._last.get(subject, float("-inf")) < PERIOD_SECONDS:
            self._silenced[subject] = self._silenced.get(subject, 0) + 1
            return
        self._last[subject] = now
        silenced = self._silenced.pop(subject, 0)
        if silenced:
            details["silenced"] = silenced
        self._log.warning(subject, **details)
