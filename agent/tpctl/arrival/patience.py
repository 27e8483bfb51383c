"""How long somebody has been waited for, without the time in which this process was itself kept from running.

On a machine whose processors others keep busy, the data plane does not get to run either; what it is late with then is
not lost.
"""

from __future__ import annotations

import time

LOOK_SECONDS = 0.02
"""How long to wait at once: whoever wakes up later than that has been kept from running for the rest."""


class Waited:
    """A clock that gains at most `LOOK_SECONDS` from one look at it to the next."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._seconds = 0.0

    def look(self) -> float:
        """The seconds that were waited since the clock was made."""
        now = time.monotonic()
        self._seconds += min(now - self._looked, LOOK_SECONDS)
        self._looked = now
        return self._seconds
