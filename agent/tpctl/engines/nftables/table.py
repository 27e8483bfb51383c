"""A table of nf_tables as a value, and as nft(8) reads it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

FAMILY = "inet"
NAME = "tpctl"
TABLE = f"{FAMILY} {NAME}"
"""The engine's own table; another one's can serve another engine for what that one cannot do."""
COMMENT_PREFIX = "tpctl/"
COMMENT_LIMIT = 127
"""Bytes; NFTNL_UDATA_COMMENT_MAXLEN (128) counts the terminating zero."""

AND = " . "
"""Between the parts of a concatenation (nft(8), "SETS")."""
UID_AND_PORT = f"uid{AND}inet_service"


class Rule(NamedTuple):
    """One rule: what it matches, what it does, what for."""

    match: str
    action: str
    comment: str

    def render(self, *, comments: bool) -> str:
        """The rule in nft's language. Every rule counts, so that `tpctl status` can tell which ones act."""
        text = " ".join(part for part in (self.match, "counter", self.action) if part)
        return f'{text} comment "{self.note}"' if comments else text

    @property
    def note(self) -> str:
        """The comment as the kernel keeps it."""
        text = (COMMENT_PREFIX + self.comment).replace('"', "'")
        return text.encode()[:COMMENT_LIMIT].decode(errors="ignore")


class Hook(NamedTuple):
    """Where a base chain is attached."""

    kind: str
    """"filter" or "nat"."""
    hook: str
    priority: int

    def render(self) -> str:
        """The chain's specification."""
        return f"type {self.kind} hook {self.hook} priority {self.priority}; policy accept;"


class Chain(NamedTuple):
    """A chain; without a hook it is only reached by a jump."""

    name: str
    rules: tuple[Rule, ...]
    hook: Hook | None = None


class Set(NamedTuple):
    """A named set of intervals, or of concatenations."""

    name: str
    type: str
    elements: tuple[str, ...]

    @property
    def has_intervals(self) -> bool:
        """Whether the kernel has to keep intervals. Of concatenations it can since Linux 5.6, and more slowly."""
        return AND not in self.type or any("-" in element for element in self.elements)

    @property
    def digest(self) -> str:
        """What tells its contents from those of any other set, short enough for a name."""
        # Not hashlib, which loads OpenSSL. Should two agree by chance, `replacement` sees that the elements differ.
        return f"{zlib.crc32('|'.join((self.type, *self.elements)).encode()):08x}"


class Table(NamedTuple):
    """A whole table in one network namespace."""

    sets: tuple[Set, ...] = ()
    chains: tuple[Chain, ...] = ()
    where: str = TABLE
    """Its family and name."""

    def render(self, *, comments: bool = True) -> str:
        """The table as nft(8) reads it; existing base chains of the same hook are added to, not replaced."""
        return "\n".join([f"table {self.where} {{", *self._body(comments), "}"]) + "\n"

    def _body(self, comments: bool) -> Iterator[str]:
        for item in self.sets:
            yield f"\tset {item.name} {{"
            yield f"\t\ttype {item.type};{' flags interval;' if item.has_intervals else ''}"
            yield f"\t\telements = {{ {', '.join(item.elements)} }}"
            yield "\t}"
        for chain in self.chains:
            yield f"\tchain {chain.name} {{"
            if chain.hook:
                yield f"\t\t{chain.hook.render()}"
            for rule in chain.rules:
                yield f"\t\t{rule.render(comments=comments)}"
            yield "\t}"
