"""Random changes to known inputs, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_INTERESTING = (0, 1, 9, 10, 13, 32, 45, 47, 58, 127, 128, 255)
_MAX_LENGTH = 4096


def mutations(corpus: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` inputs: each of the corpus with a few changes, or crossed with another."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.randrange(6)):
            _change(data, corpus, chance)
        yield bytes(data[:_MAX_LENGTH])


def _change(data: bytearray, corpus: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(6)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << chance.randrange(8)
    elif kind == 1 and data:
        data[at % len(data)] = chance.choice(_INTERESTING)
    elif kind == 2:
        data[at:at] = chance.randbytes(chance.randrange(8))
    elif kind == 3:
        del data[at : at + chance.randrange(16)]
    elif kind == 4:
        data[at:at] = data[at : at + chance.randrange(64)]
    else:
        other = chance.choice(corpus)
        begin = chance.randrange(len(other) + 1)
        data[at:] = other[begin:]
