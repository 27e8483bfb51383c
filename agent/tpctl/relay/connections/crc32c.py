"""CRC-32C (Castagnoli), as RFC 4960 appendix B describes it: the checksum of the PROXY protocol's version 2."""

from __future__ import annotations

from collections.abc import Iterable

_POLYNOMIAL = 0x82F63B78
"""Reflected."""


def _table() -> tuple[int, ...]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (_POLYNOMIAL if number & 1 else 0)
        table.append(number)
    return tuple(table)


_TABLE = _table()


def crc32c(data: Iterable[int]) -> int:
    """The checksum of bytes.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
