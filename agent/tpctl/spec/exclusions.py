"""Marks and interfaces by which connections are left alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MARK = 2**32 - 1
"""A packet's mark, and a socket's, has 32 bits (SO_MARK, socket(7))."""


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """The marks that have the bits of `value` where `mask` has bits; other bits do not count (ip-rule(8), fwmark).

    Raises ValueError for numbers of more than 32 bits, for bits outside the mask, which no packet could match, and for
    a value of 0: that would be every packet without a mark.
    """

    value: int
    mask: int = MAX_MARK

    def __post_init__(self) -> None:
        if not 0 < self.value <= MAX_MARK or not 0 < self.mask <= MAX_MARK:
            raise ValueError(f"{self} is not within 0x1-{MAX_MARK:#x}")
        if self.value & ~self.mask:
            raise ValueError(f"{self} has bits outside its mask")

    def __contains__(self, mark: object) -> bool:
        return isinstance(mark, int) and mark & self.mask == self.value

    def __str__(self) -> str:
        return f"{self.value:#x}" if self.mask == MAX_MARK else f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True, order=True)
class Interfaces:
    """The interface of one name or, with a `+` at its end, all whose name begins so, as in iptables(8)."""

    pattern: str

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name.startswith(self.pattern[:-1]) if self.pattern.endswith("+") else name == self.pattern

    def covers(self, other: Interfaces) -> bool:
        """Whether every interface that `other` means is among these."""
        return other == self or (self.pattern.endswith("+") and other.pattern.removesuffix("+") in self)

    def meets(self, other: Interfaces) -> bool:
        """Whether an interface may be among both."""
        return self.covers(other) or other.covers(self)

    def __str__(self) -> str:
        return self.pattern
