"""firewalld's direct.xml as bytes: our elements put in and taken out, every other byte left where it is. Pure.

The format is that of firewalld.direct(5). Parsing finds positions only; nothing of the file is ever written anew.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.parsers import expat

from tpctl.engines.direct import Chain, DirectRules, is_ours

EMPTY = b'<?xml version="1.0" encoding="utf-8"?>\n<direct>\n</direct>\n'
INDENT = b"  "
_TAG = re.compile(rb"""<(?:[^"'>]|"[^"]*"|'[^']*')*>""")
_LEADING_BREAK = re.compile(rb"\r?\n?[ \t]*\Z")


class UnreadableError(ValueError):
    """The file is not what firewalld.direct(5) describes."""


@dataclass(slots=True)
class _Reading:
    """Where our elements stand, and the end of the content of <direct>."""

    owned: list[tuple[int, int]] = field(default_factory=list)
    closing: int = -1
    """Where `</direct>` begins, or `<direct/>`."""
    is_open: bool = True
    """False for `<direct/>`."""


def holds_ours(content: bytes) -> bool:
    """Whether anything in the file is tpctl's or kumactl's. Raises UnreadableError."""
    return bool(_read(content).owned)


def with_rules(content: bytes, rules: DirectRules) -> bytes:
    """The file with `rules` in place of whatever tpctl or kumactl has in it. Raises UnreadableError."""
    rest = without_ours(content)
    lines = [line.encode() for line in elements(rules)]
    return _inserted(rest, lines) if lines else rest


def without_ours(content: bytes) -> bytes:
    """The file without our elements and the lines they stood on. Raises UnreadableError."""
    pieces: list[bytes] = []
    position = 0
    for start, end in _read(content).owned:
        pieces.append(_LEADING_BREAK.sub(b"", content[position:start], count=1))
        position = end
    return b"".join([*pieces, content[position:]])


def elements(direct: DirectRules) -> Iterator[str]:
    """The chains, then the rules; priorities give every rule its place."""
    for chain in direct.chains:
        yield f"<chain {_attributes(chain)}/>"
    for chain, priority, words in direct.rules:
        text = html.escape(shlex.join(words), quote=False)
        yield f'<rule {_attributes(chain)} priority="{priority}">{text}</rule>'


def _attributes(chain: Chain) -> str:
    return f'ipv="{chain.ipv}" table="{chain.table}" chain="{chain.name}"'


def _inserted(content: bytes, lines: Sequence[bytes]) -> bytes:
    """The file with elements after everything else in <direct>; taking them out again gives the same bytes."""
    reading = _read(content)
    newline = b"\r\n" if b"\r\n" in content else b"\n"
    block = b"".join(newline + INDENT + line for line in lines)
    if not reading.is_open:
        tag = _tag(content, reading.closing)
        opened = tag.rstrip(b">").rstrip(b"/").rstrip() + b">"
        rest = content[reading.closing + len(tag) :]
        return content[: reading.closing] + opened + block + newline + b"</direct>" + rest
    end = len(content[: reading.closing].rstrip())
    return content[:end] + block + content[end:]


def _tag(content: bytes, start: int) -> bytes:
    found = _TAG.match(content, start)
    if not found:
        raise UnreadableError(f"no tag ends after byte {start}")
    return found[0]


def _read(content: bytes) -> _Reading:
    """Parse the file. Raises UnreadableError."""
    try:
        content.decode("utf-8")
        reader = _Reader(content)
        reader.parser.Parse(content, True)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8 text (byte {error.start})") from error
    except UnreadableError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # the latter two of an encoding that nobody knows
        raise UnreadableError(str(error)) from error
    if reader.reading.closing < 0:
        raise UnreadableError("it has no <direct> element")
    return reader.reading


class _Reader:
    """Follows the parser through the children of <direct>."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reading = _Reading()
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.depth = 0
        self.root = self.begin = 0
        self.attributes: dict[str, str] = {}
        self.said: list[str] = []

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth == 1 and name != "direct":
            raise UnreadableError(f"it holds <{name}>, not <direct>")
        here = self.parser.CurrentByteIndex
        if self.depth == 1:
            self.root = here
            self.reading.is_open = not self._stands_alone(here)
        if self.depth == 2:
            self.begin, self.attributes, self.said = here, attributes, []

    def _text(self, text: str) -> None:
        self.said.append(text)

    def _end(self, name: str) -> None:
        here = self.parser.CurrentByteIndex
        if self.depth == 1:
            self.reading.closing = here if self.reading.is_open else self.root
        elif self.depth == 2 and is_ours(self.attributes.get("chain", ""), "".join(self.said)):
            # expat reports the end of <x/> behind it, that of <x></x> before its closing tag.
            end = here if self._stands_alone(self.begin) else here + len(_tag(self.content, here))
            self.reading.owned.append((self.begin, end))
        self.depth -= 1

    def _stands_alone(self, begin: int) -> bool:
        return _tag(self.content, begin).endswith(b"/>")
