"""Text that comes from the host: names of interfaces, comments, paths, names of processes may be any bytes.

They are decoded here, so that bytes which are no UTF-8 pass through tpctl unchanged (surrogateescape, PEP 383), and
encoded here, on their way back to the kernel or to a program. On their way to people, `printable` writes out what a
terminal might obey or could not show.

Text of the kernel ends its lines with "\\n", and separates words by spaces and tabs. str.splitlines, str.split and the
newlines of open() know many more separators, all of which may stand in somebody's name; so they are not used for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_COLOUR = r"\x1b\[(?:[0-2]|[39][0-7])m"
"""What click.style writes: reset, bold, dim and the colours of text (ECMA-48, 8.3.117)."""
_PIECE = re.compile(rf"{_COLOUR}|.", re.DOTALL)
_ESCAPED = re.compile(r"[\udc80-\udcff]")
"""By which surrogateescape stands for the bytes 0x80 to 0xff."""


def decoded(raw: bytes) -> str:
    """Bytes as text; `encoded` makes the same bytes of it."""
    return raw.decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """The bytes that `decoded` made a text of. Raises UnicodeEncodeError for other lone surrogates."""
    return text.encode("utf-8", "surrogateescape")


def read(path: str | Path) -> str:
    """A file of /proc or /sys. Raises OSError."""
    with open(path, "rb") as file:  # noqa: PTH123 - `tpctl --help` loads this module, and should not load pathlib
        return decoded(file.read())


def lines(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    found = text.split("\n")
    return found[:-1] if found[-1] == "" else found


def words(line: str) -> list[str]:
    """What stands between the spaces and tabs of a line."""
    return [word for word in line.replace("\t", " ").split(" ") if word]


def printable(text: str) -> str:
    """A text as a terminal may have it: colours, newlines and tabs stay, what else is no printable sign is written out.

    >>> printable("x\\udcffy \\x1b]0;title\\x07")
    'x\\\\xffy \\\\x1b]0;title\\\\x07'
    """
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return _PIECE.sub(lambda piece: _written_out(piece[0]), text)


def on_one_line(text: str) -> str:
    """A text in which whatever is no printable sign is written out, newlines too."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def without_surrogates(text: str) -> str:
    """A text that any encoding of Unicode can hold: bytes that are no UTF-8 are written out."""
    return text if text.isascii() else _ESCAPED.sub(lambda byte: _escape(byte[0]), text)


def _written_out(piece: str) -> str:
    return piece if len(piece) > 1 or piece in "\n\t" or piece.isprintable() else _escape(piece)


def _escape(char: str) -> str:
    if _ESCAPED.match(char):
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
