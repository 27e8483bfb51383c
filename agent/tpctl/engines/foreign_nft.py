"""What nft lists, as `foreign` data. Pure.

A rule's text is read from left to right. What is not known here becomes a condition that nobody can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from tpctl.engines.foreign import Chain, Condition, Hook, Rule, Table, Verdict
from tpctl.engines.nftables import listing

_TOKEN = re.compile(r'"[^"]*"|[{},]|[^\s{},"]+')
_HANDLE = re.compile(r" # handle (\d+)$")
_ELEMENTS = re.compile(r"elements = \{(.*?)\}", re.DOTALL)
_MOST_ELEMENTS = 4096
"""A set of more is one that nobody can tell: bans come by the ten thousand."""
_FIELDS: dict[tuple[str, ...], str] = {
    ("iifname",): "in_interface", ("iif",): "in_interface", ("oifname",): "out_interface", ("oif",): "out_interface",
    ("meta", "iifname"): "in_interface", ("meta", "oifname"): "out_interface",
    ("ip", "saddr"): "source", ("ip6", "saddr"): "source", ("ip", "daddr"): "destination",
    ("ip6", "daddr"): "destination", ("ip", "protocol"): "protocol", ("ip6", "nexthdr"): "protocol",
    ("meta", "l4proto"): "protocol", ("meta", "nfproto"): "family",
    ("tcp", "dport"): "destination_port", ("udp", "dport"): "destination_port", ("th", "dport"): "destination_port",
    ("tcp", "sport"): "source_port", ("udp", "sport"): "source_port", ("th", "sport"): "source_port",
    ("ct", "state"): "state", ("ct", "status"): "status", ("ct", "direction"): "direction",
    ("ct", "original", "proto-dst"): "original_port", ("ct", "original", "ip", "daddr"): "original_destination",
    ("ct", "original", "ip6", "daddr"): "original_destination",
    ("meta", "skuid"): "uid", ("skuid",): "uid", ("meta", "mark"): "mark", ("mark",): "mark",
    ("fib", "daddr", "type"): "destination_type", ("fib", "saddr", "type"): "source_type",
    ("icmp", "type"): "never", ("icmpv6", "type"): "never", ("icmp", "code"): "never",
}  # fmt: skip
"""The field of `packets` that an expression asks for."""
_PORTS = {"tcp": "tcp", "udp": "udp"}
_FAMILIES = {"ip": "ipv4", "ip6": "ipv6"}
_VERDICTS = {verdict.value: verdict for verdict in (Verdict.ACCEPT, Verdict.DROP, Verdict.REJECT, Verdict.RETURN)}
_CALLS = {"jump": Verdict.JUMP, "goto": Verdict.GOTO}
_TRANSLATES = frozenset({"dnat", "redirect", "tproxy"})
_MASQUERADES = frozenset({"snat", "masquerade"})
_DOES = frozenset(
    {*_VERDICTS, *_CALLS, *_TRANSLATES, *_MASQUERADES, "notrack", "counter", "log", "limit", "comment", "queue"}
)
_NUMBERED = frozenset({"packets", "bytes", "level", "group", "prefix", "flags", "snaplen", "queue-threshold"})

Sets = Mapping[str, tuple[str, ...]]
"""The elements of a table's sets and maps, each as its words; of a map, "key : verdict"."""


def tables_of(text: str) -> Iterator[Table]:
    """The tables of a listing, which may have been made with handles, or stateless."""
    for found in listing.read(text):
        sets = {name: _elements(content) for _, name, content in found.others}
        yield Table("nft", found.family, found.name, {chain.name: _chain(chain, sets) for chain in found.chains})


def _chain(chain: listing.ListedChain, sets: Sets) -> Chain:
    held = tuple(rule for text in chain.rules for rule in rules(text, sets))
    if chain.hook not in set(Hook):
        return Chain(chain.name, held)
    policy = Verdict.DROP if chain.policy == "drop" else Verdict.ACCEPT
    return Chain(chain.name, held, Hook(chain.hook), chain.priority or 0, policy, chain.kind or "filter")


def _elements(content: str) -> tuple[str, ...]:
    found = _ELEMENTS.search(content)
    parts = tuple(" ".join(part.split()) for part in found[1].split(",")) if found else ()
    return parts if len(parts) <= _MOST_ELEMENTS else ("@",)


def rules(text: str, sets: Sets | None = None) -> tuple[Rule, ...]:
    """A rule; more than one where a map gives each key a verdict of its own."""
    return tuple(_Reader(text, sets or {}).rules())


class _Reader:
    """Reads one rule."""

    def __init__(self, text: str, sets: Sets) -> None:
        handle = _HANDLE.search(text)
        self.text = _HANDLE.sub("", text)
        self.handle = int(handle[1]) if handle else 0
        self.sets = sets
        self.tokens = _TOKEN.findall(self.text)
        self.at = 0
        self.conditions: list[Condition] = []
        self.verdict, self.target = Verdict.CONTINUE, ""
        self.by_key: list[tuple[Condition, str]] = []

    def rules(self) -> Iterator[Rule]:
        while self.at < len(self.tokens):
            self._statement()
        for condition, words in self.by_key:
            verdict, target = _verdict(words.split())
            yield Rule(self.text, (*self.conditions, condition), verdict, target, self.handle)
        if not self.by_key:
            yield Rule(self.text, tuple(self.conditions), self.verdict, self.target, self.handle)

    def _next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _statement(self) -> None:
        for size in (4, 3, 2, 1):
            words = tuple(self.tokens[self.at : self.at + size])
            if len(words) == size and words in _FIELDS:
                self.at += size
                self._expression(words, _FIELDS[words])
                return
        word = self._next()
        if word in _VERDICTS or word in _CALLS:
            self.verdict, self.target = _verdict([word, self._peek()])
            self.at = len(self.tokens)
        elif word in _TRANSLATES:
            self.verdict, self.at = Verdict.TRANSLATE, len(self.tokens)
        elif word in _MASQUERADES:
            self.verdict, self.at = Verdict.MASQUERADE, len(self.tokens)
        elif word in ("counter", "log"):
            while self._peek() in _NUMBERED:
                self.at += 2
        elif word == "comment":
            self.at += 1
        elif word == "notrack":
            self.verdict = Verdict.UNTRACK
        elif word == "fib":
            self._pass_over("fib")
        elif word == "tcp" and self._peek() == "flags":
            self._flags()
        elif self.tokens[self.at : self.at + 2] and "set" in self.tokens[self.at : self.at + 2]:
            self._setting()
        elif word != "continue":
            self.conditions.append(Condition(f"? {word}"))

    def _expression(self, words: tuple[str, ...], field: str) -> None:
        if field == "mark" and self._peek() == "set":
            self._setting()
            return
        if words[0] in _PORTS:
            self.conditions.append(Condition("protocol", (_PORTS[words[0]],)))
        elif words[0] in _FAMILIES and words[1:] != ("protocol",):
            self.conditions.append(Condition("family", (_FAMILIES[words[0]],)))
        mask = ""
        if self._peek() in ("&", "and"):
            self.at += 1
            mask = self._next()
        if self._peek() == ".":
            self._pass_over("concatenation")
            return
        if self._peek() == "vmap":
            self.at += 1
            self._map(field)
            return
        negated = self._peek() == "!="
        if self._peek() in ("!=", "=="):
            self.at += 1
        values = tuple(value.strip('"') for value in self._values())
        if mask:
            values = tuple(f"{value}/{mask}" for value in values)
        self.conditions.append(Condition(field, values, negated))

    def _values(self) -> Iterator[str]:
        first = self._next()
        if first == "{":
            yield from (" ".join(element) for element in self._braced())
        elif first.startswith("@"):
            found = self.sets.get(first[1:])
            yield from (element.split()[0] if element.split() else "@" for element in found) if found else (first,)
        else:
            yield first
            while self._peek() == ",":
                self.at += 1
                yield self._next()

    def _braced(self) -> Iterator[list[str]]:
        """The elements up to the closing brace."""
        element: list[str] = []
        while self.at < len(self.tokens):
            word = self._next()
            if word in ("}", ","):
                if element:
                    yield element
                element = []
                if word == "}":
                    return
            else:
                element.append(word)

    def _map(self, field: str) -> None:
        first = self._next()
        if first == "{":
            elements: Iterable[list[str]] = list(self._braced())
        else:
            elements = [element.split() for element in self.sets.get(first.removeprefix("@"), ())]
        for element in elements:
            if ":" in element:
                at = element.index(":")
                key = " ".join(element[:at]).strip('"')
                self.by_key.append((Condition(field, (key,)), " ".join(element[at + 1 :])))
        if not self.by_key:
            self.conditions.append(Condition(f"? vmap {first}"))

    def _flags(self) -> None:
        rest = " ".join(self.tokens[self.at : self.at + 12])
        if re.match(r"flags (?:syn ,? ?/ ?|& ?\(?(?:fin ?\|? ?)?syn\b.*?== syn\b|syn / )", rest):
            self.conditions.append(Condition("syn"))
            self._skip()
        else:
            self._pass_over("tcp flags")

    def _pass_over(self, what: str) -> None:
        """Up to what the rule does: nobody here can tell what it asks."""
        self.conditions.append(Condition(f"? {what}"))
        self._skip()

    def _skip(self) -> None:
        while self.at < len(self.tokens) and self._peek() not in _DOES:
            self.at += 1

    def _setting(self) -> None:
        """`meta mark set 0x1`: the packet's mark, or something else that no later rule here asks for."""
        if "mark" in self.tokens[max(self.at - 2, 0) : self.at + 1]:
            self.verdict = Verdict.MARK
        self.at = self.tokens.index("set", self.at) + 2
        while self._peek() in ("|", "or", "&", "and", "^", "xor", "mark"):
            self.at += 2


def _verdict(words: list[str]) -> tuple[Verdict, str]:
    first = words[0] if words else ""
    if first in _CALLS:
        return _CALLS[first], words[1] if len(words) > 1 else ""
    return _VERDICTS.get(first, Verdict.CONTINUE), ""
