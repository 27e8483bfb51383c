"""What each connection of the torture does, known to its client and its server alike from its number. Pure."""

from __future__ import annotations

import enum
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = random.Random(0).randbytes(1 << 20)
_PIECE = 48 * 1024
HEADER = 8


class Way(enum.Enum):
    """How a connection ends, or dawdles."""

    BOTH_AT_ONCE = enum.auto()
    CLIENT_FIRST = enum.auto()
    """The server sends when the client's stream has ended: the connection is half-closed meanwhile."""
    SERVER_FIRST = enum.auto()
    """The client sends when the server's stream has ended."""
    SLOW_CLIENT = enum.auto()
    SLOW_SERVER = enum.auto()
    STALLS = enum.auto()
    """Both stop in the middle, for a second."""
    CLIENT_RESETS = enum.auto()
    SERVER_RESETS = enum.auto()


RESETS = (Way.CLIENT_RESETS, Way.SERVER_RESETS)
_SIZES = (0, 1, 100, 1460, 65535, 65536, 65537, 200_000, 700_000)


@dataclass(frozen=True, slots=True)
class Script:
    """One connection."""

    number: int
    way: Way
    up: int
    down: int
    """Bytes of the client's and of the server's stream."""

    @classmethod
    def of(cls, seed: int, number: int) -> Script:
        """The one of a number."""
        chance = random.Random(seed << 32 | number)
        up, down = (size + chance.randrange(3) * chance.randrange(1000) for size in chance.choices(_SIZES, k=2))
        return cls(number, chance.choice(tuple(Way)), up, down)

    def pieces(self, size: int, *, is_up: bool) -> Iterator[bytes]:
        """A stream. Those of two connections differ, and so do those of the two directions."""
        offset = (self.number * 7919 + is_up * 104_729) % len(_BLOCK)
        while size:
            piece = _BLOCK[offset : offset + min(size, _PIECE)]
            yield piece
            size -= len(piece)
            offset = (offset + len(piece)) % len(_BLOCK)

    def digest(self, size: int, *, is_up: bool) -> bytes:
        """Of a stream that arrived whole."""
        whole = hashlib.sha256()
        for piece in self.pieces(size, is_up=is_up):
            whole.update(piece)
        return whole.digest()
