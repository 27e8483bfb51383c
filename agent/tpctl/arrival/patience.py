"""How long somebody has been waited for, without most of the time in which this process was kept from running.

On a machine whose processors others keep busy, the data plane does not get to run either; what it is late with then is
not lost.
"""

from __future__ import annotations

import time

LOOK_SECONDS = 0.02
"""How long to wait at once: whoever wakes up later than that has been kept from running for the rest."""
MOST_TIMES = 10
"""A second of patience never lasts longer than so many seconds."""


class Waited:
    """A clock that gains at most `LOOK_SECONDS` from one look at it to the next, or a `MOST_TIMES`th of the time."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._seconds = 0.0

    def look(self) -> float:
        """The seconds that were waited since the clock was made."""
        now = time.monotonic()
        passed = now - self._looked
        self._seconds += min(passed, max(LOOK_SECONDS, passed / MOST_TIMES))
        self._looked = now
        return self._seconds
