"""Room that several kinds of users share, and of which each has a part that nobody else gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Shares:
    """So many places, some of them kept for each kind; whatever is not kept goes to whoever comes first.

    >>> shares = Shares(10, (2, 3))
    >>> [shares.take(0, 7), shares.take(0, 1), shares.take(1, 3), shares.take(1, 1)]
    [True, False, True, False]
    >>> shares.give(0, 1)
    >>> shares.take(1, 1)
    True
    """

    __slots__ = ("_common", "_kept", "_used", "total")

    def __init__(self, total: int, kept: Sequence[int]) -> None:
        """`kept` are the places of each kind, by its number; together they are no more than the total."""
        self.total = total
        self._kept = tuple(kept)
        self._used = [0] * len(kept)
        self._common = total - sum(kept)
        """Places that are kept for nobody, and not taken."""

    def has_room(self, kind: int, places: int = 1) -> bool:
        """Whether so many would be had."""
        return self._beyond(kind, places) <= self._common

    def take(self, kind: int, places: int = 1) -> bool:
        """Take all of them, or none; whether they were to be had."""
        used = self._used[kind] + places
        if used > self._kept[kind]:
            beyond = self._beyond(kind, places)
            if beyond > self._common:
                return False
            self._common -= beyond
        self._used[kind] = used
        return True

    def give(self, kind: int, places: int = 1) -> None:
        """Give some back."""
        used = self._used[kind]
        self._used[kind] = used - places
        if used > self._kept[kind]:
            self._common += self._beyond(kind, places)

    def used(self, kind: int) -> int:
        """How many a kind has at this moment."""
        return self._used[kind]

    def _beyond(self, kind: int, places: int) -> int:
        """How many of `places` more would have to come from those that are kept for nobody."""
        over = self._used[kind] + places - self._kept[kind]
        return 0 if over <= 0 else min(over, places)
