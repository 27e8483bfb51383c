"""What nft lists as text, read into values.

nft's JSON would be easier to read, but there is none where a name in the kernel is no UTF-8: nft aborts (json.c, chain
`CH\\xff` and interface `x\\xff`, seen with 1.0.6). Its text has such names as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tpctl.system.text import lines

_TABLE = re.compile(r"table (\S+) ([^ ]+) \{")
_PART = re.compile(r"\t(\S+) ([^ ]+) \{")
_HOOK = re.compile(r"\t\ttype (\S+) hook (\S+) .*?priority ([^;]*);(?: policy (\S+);)?")
_PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
"""Names of priorities in the families ip, ip6 and inet (nft(8), "CHAINS")."""
_REDIRECT = re.compile(r" (redirect|dnat) (?:ip6? to ip6? daddr|to ):(\d+)\b")
_COMMENT = re.compile(r' comment "([^"]*)"$')


@dataclass(frozen=True, slots=True)
class ListedChain:
    """A chain and what is in it."""

    name: str
    hook: str | None = None
    """Where it is attached, as nft calls it ("forward"); None for a chain that is only reached by a jump."""
    policy: str | None = None
    rules: tuple[str, ...] = ()
    kind: str | None = None
    """"filter", "nat" or "route"; None as above."""
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class ListedTable:
    """A table and what is in it."""

    family: str
    name: str
    chains: tuple[ListedChain, ...] = ()
    others: tuple[tuple[str, str, str], ...] = ()
    """Kind, name and content of its sets, maps and whatever else is no chain."""

    def objects(self) -> list[dict[str, object]]:
        """As far as it can be told, what libnftables-json(5) would call its objects. A flag keeps it from being reused.

        Tests of ours look for chains, ports that are redirected to, comments and sets.
        """
        found: list[dict[str, object]] = [{"table": {"name": self.name, "flags": ["listed as text"]}}]
        found += [{kind: {"name": name}} for kind, name, _ in self.others]
        for chain in self.chains:
            found.append({"chain": {"name": chain.name}})
            found += [{"rule": {"chain": chain.name, "handle": 0, **_rule(text)}} for text in chain.rules]
        return found


def _rule(text: str) -> dict[str, object]:
    ports = [{action: {"port": int(port)}} for action, port in _REDIRECT.findall(text)]
    comment = _COMMENT.search(text)
    return {"expr": ports, **({"comment": comment[1]} if comment else {})}


def read(listing: str) -> list[ListedTable]:
    """The tables of a listing."""
    tables: list[ListedTable] = []
    table: list[str] = []
    for line in lines(listing):
        if line == "}" and table:
            tables.append(_table(table))
            table = []
        elif table or _TABLE.match(line):
            table.append(line)
    return tables


def _table(content: list[str]) -> ListedTable:
    found = _TABLE.match(content[0])
    assert found is not None
    chains: list[ListedChain] = []
    others: list[tuple[str, str, str]] = []
    for kind, name, body in _parts(content[1:]):
        if kind == "chain":
            chains.append(_chain(name, body))
        else:
            others.append((kind, name, "\n".join(body)))
    return ListedTable(found[1], found[2], tuple(chains), tuple(others))


def _parts(content: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    kind, name, body = "", "", list[str]()
    for line in content:
        if found := _PART.match(line):
            kind, name, body = found[1], found[2], []
        elif line == "\t}" and kind:
            yield kind, name, body
            kind = ""
        elif kind:
            body.append(line)


def _chain(name: str, body: list[str]) -> ListedChain:
    hook = next((found for line in body if (found := _HOOK.match(line))), None)
    rules = tuple(line.strip("\t") for line in body if not _HOOK.match(line) and not line.startswith('\t\tcomment "'))
    if hook is None:
        return ListedChain(name, rules=rules)
    return ListedChain(name, hook[2], hook[4], rules, hook[1], _priority(hook[3]))


def _priority(text: str) -> int | None:
    """A number, or a name and what is added to it."""
    try:
        name, _, added = text.strip().partition(" ")
        return _PRIORITIES.get(name, 0) + int(added.replace(" ", "") or 0) if name in _PRIORITIES else int(text)
    except ValueError:
        return None
