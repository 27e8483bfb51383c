"""One iptables rule as a value: built from a policy, written as text, read back from text.

Both variants of the iptables engine work on this one form, so that they cannot drift apart. The text form is that of
iptables-save(8); whatever is rendered here parses back to the same value.

>>> Rule(protocol="tcp", matches=(match("tcp", ("dport", "22")),), target="RETURN").render()
'-p tcp -m tcp --dport 22 -j RETURN'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

COMMENT_LIMIT = 255
"""Bytes of a comment, XT_MAX_COMMENT_LEN - 1 in include/uapi/linux/netfilter/xt_comment.h."""

FREE_TEXT = frozenset(
    f"--{name}" for name in ("comment", "helper", "hex-string", "log-prefix", "name", "nflog-prefix", "path", "string")
)
"""Options with one value, which may look like an option: iptables-save quotes no word of letters, digits, dashes and
underscores (xtables_save_string in libxtables/xtables.c), and so a comment can be `-j`."""
NAMES = frozenset(("-i", "-o", "-j", "-g", "--physdev-in", "--physdev-out"))
"""iptables-save never quotes the name of an interface or a chain, though it may hold quotes and backslashes, but no
white space (dev_valid_name in net/core/dev.c, assert_valid_chain_name in iptables/xshared.c)."""

DEFAULT_LOG_LEVEL = ("4",)
"""iptables-save leaves out the default level of LOG (extensions/libxt_LOG.c)."""


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """`! --name value value`, without the dashes."""

    name: str
    values: tuple[str, ...] = ()
    negated: bool = False

    def render(self) -> str:
        """As iptables-save writes it."""
        words = [f"--{self.name}", *(quote(value) for value in self.values)]
        return " ".join(["!", *words] if self.negated else words)


@dataclass(frozen=True, slots=True, order=True)
class Match:
    """A match extension (`-m name ...`) and its options."""

    name: str
    options: tuple[Option, ...] = ()

    def render(self) -> str:
        """As iptables-save writes it."""
        return " ".join([f"-m {self.name}", *(option.render() for option in self.options)])


@dataclass(frozen=True, slots=True, order=True)
class Criterion:
    """A value of the rule itself (`-s`, `-d`, `-i`, `-o`), possibly negated."""

    value: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule without the chain it stands in."""

    target: str
    protocol: str | None = None
    source: Criterion | None = None
    destination: Criterion | None = None
    in_interface: Criterion | None = None
    out_interface: Criterion | None = None
    matches: tuple[Match, ...] = ()
    target_options: tuple[Option, ...] = ()
    comment: str | None = None
    goto: bool = False

    def render(self, *, comments: bool = True) -> str:
        """The rule as iptables-restore(8) reads it, without `-A CHAIN`."""
        words = []
        for flag, criterion in self.criteria():
            words.append(f"{'! ' if criterion.negated else ''}{flag} {quote(criterion.value)}")
        if self.protocol:
            words.append(f"-p {self.protocol}")
        words += [match.render() for match in self.matches]
        if comments and self.comment is not None:
            words.append(f"-m comment --comment {quote(self.comment)}")
        words.append(f"{'-g' if self.goto else '-j'} {self.target}")
        words += [option.render() for option in self.target_options]
        return " ".join(words)

    def criteria(self) -> Iterator[tuple[str, Criterion]]:
        """The rule's own criteria with their flags, in the order of iptables-save."""
        pairs = (
            ("-s", self.source),
            ("-d", self.destination),
            ("-i", self.in_interface),
            ("-o", self.out_interface),
        )
        return ((flag, criterion) for flag, criterion in pairs if criterion is not None)

    def canonical(self) -> Rule:
        """The rule for comparison: comments, the order of matches and defaults that tools leave out do not count."""
        options = tuple(
            option for option in self.target_options if (option.name, option.values) != ("log-level", DEFAULT_LOG_LEVEL)
        )
        matches = tuple(sorted(match for match in self.matches if match.options))
        return replace(self, comment=None, matches=matches, target_options=tuple(sorted(options)))


def match(name: str, *options: tuple[str, str] | Option) -> Match:
    """A match extension from (option, value) pairs."""
    return Match(
        name, tuple(option if isinstance(option, Option) else Option(option[0], (option[1],)) for option in options)
    )


def quote(value: str) -> str:
    """A value as iptables-restore(8) reads it: in quotes, unless it is plain and cannot be taken for an option.

    That reads line by line, and knows no way to write a line break: a space stands for it.
    """
    if value and value[0] != "-" and all(char.isalnum() or char in "_-,.:/+=@%^*#" for char in value):
        return value
    escaped = "".join(f"\\{char}" if char in "\"\\'" else char for char in value)
    return f'"{escaped}"'.replace("\n", " ")


_BLANK = " \t\n"
_QUOTED = re.compile(rf'"((?:[^"\\]|\\.)*+)"(?=[{_BLANK}]|$)', re.DOTALL)
_QUOTED_NAME = re.compile(rf'"((?:[^"\\{_BLANK}]|\\.)*+)"(?=[{_BLANK}]|$)')
_BARE = re.compile(rf"[^{_BLANK}]+")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def split(text: str) -> list[tuple[str, bool]]:
    """The words of a line of iptables-save, each with whether it was quoted."""
    words: list[tuple[str, bool]] = []
    at = 0
    while found := _BARE.search(text, at):
        quoting = _QUOTED_NAME if words and words[-1][0] in NAMES and not words[-1][1] else _QUOTED
        if quoted := quoting.match(text, found.start()):
            words.append((_ESCAPE.sub(r"\1", quoted[1]), True))
        else:
            words.append((found[0], False))
        at = (quoted or found).end()
    return words


def options_of(words: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, str]]:
    """Each option of a rule with the word that follows it. What is quoted is none, and nothing in free text."""
    option: str | None = None
    for word, quoted in words:
        is_text = option is not None and option in FREE_TEXT | NAMES
        if option is not None:
            yield option, word
        option = word if word.startswith("-") and not quoted and not is_text else None


_CRITERIA = {
    "-s": "source",
    "--source": "source",
    "-d": "destination",
    "--destination": "destination",
    "-i": "in_interface",
    "-o": "out_interface",
}


def parse(text: str) -> Rule:
    """The rule of a line of iptables-save, given what follows `-A CHAIN`.

    Raises ValueError when the line has no target and so is none of the rules tpctl or kumactl writes.
    """
    return _Parser(split(text)).rule()


class _Parser:
    """Reads words left to right; an option belongs to the extension named last."""

    def __init__(self, words: list[tuple[str, bool]]) -> None:
        self.words = words
        self.position = 0

    def rule(self) -> Rule:
        fields: dict[str, Criterion | str | bool] = {}
        matches: list[Match] = []
        target: tuple[str, bool] | None = None
        options: tuple[Option, ...] = ()
        comment: str | None = None
        negated = False
        while (word := self._next()) is not None:
            if word == "!":
                negated = True
                continue
            if word in _CRITERIA:
                fields[_CRITERIA[word]] = Criterion(self._value(), negated)
            elif word in ("-p", "--protocol"):
                fields["protocol"] = self._value()
            elif word in ("-m", "--match"):
                name = self._value()
                found = Match(name, tuple(self._options()))
                if name == "comment":
                    comment = " ".join(found.options[0].values) if found.options else None
                else:
                    matches.append(found)
            elif word in ("-j", "--jump", "-g", "--goto"):
                target = (self._value(), word in ("-g", "--goto"))
                options = tuple(self._options())
            else:
                raise ValueError(f"cannot read {word!r} in a rule")
            negated = False
        if target is None:
            raise ValueError("the rule has no target")
        return Rule(
            target=target[0],
            goto=target[1],
            matches=tuple(matches),
            target_options=options,
            comment=comment,
            **fields,  # type: ignore[arg-type]
        )

    def _next(self) -> str | None:
        if self.position >= len(self.words):
            return None
        self.position += 1
        return self.words[self.position - 1][0]

    def _value(self) -> str:
        value = self._next()
        if value is None:
            raise ValueError("the rule ends where a value should stand")
        return value

    def _options(self) -> Iterable[Option]:
        while self._at_option():
            negated = self.words[self.position] == ("!", False)
            self.position += negated
            name = self._value()
            values = [self._value()] if name in FREE_TEXT else []
            while self.position < len(self.words) and not self._at_flag():
                values.append(self._value())
            yield Option(name[2:], tuple(values), negated)

    def _at_flag(self) -> bool:
        word, quoted = self.words[self.position]
        return not quoted and (word == "!" or (word.startswith("-") and not word[1:2].isdigit()))

    def _at_option(self) -> bool:
        if self.position >= len(self.words):
            return False
        following = self.position + (self.words[self.position] == ("!", False))
        return (
            following < len(self.words) and self.words[following][0].startswith("--") and not self.words[following][1]
        )
