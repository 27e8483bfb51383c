"""Reading a mapping of a YAML file key by key: every problem is noted with its place, and reading goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tpctl.config.sources import did_you_mean
from tpctl.config.traffic import read_networks
from tpctl.config.values import BadValueError, quoted, read_bool, read_duration, shown, whole_number
from tpctl.relay.loop.networks import NetworkSet
from tpctl.relay.settings.access import EVERYBODY, Access
from tpctl.relay.settings.model import MAX_WORKERS, TrustedSources

T = TypeVar("T")
D = TypeVar("D")
UNIX = "unix:"


class ConfigSection:
    """A mapping, and where it stands."""

    def __init__(self, tree: object, place: str, problems: list[str]) -> None:
        self.place = place
        """As a message begins: "file relay.yaml: listeners[0]"."""
        self.problems = problems
        self._asked: list[str] = []
        self._values: Mapping[object, object] = {}
        self.is_another_value = tree is not None and not isinstance(tree, Mapping)
        """Whether a value stands where keys are expected, which is complained of by now."""
        if isinstance(tree, Mapping):
            self._values = tree
        elif tree is not None:
            problems.append(f"{place.removesuffix(': ')}: {quoted(tree)} is a value where keys are expected")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def complain(self, key: str, problem: str) -> None:
        """Note what is wrong with the value of a key."""
        self.problems.append(f"{self._at(key)}: {problem}")

    def take(self, key: str, read: Callable[[object], T], default: D) -> T | D:
        """The value of a key, which is known from now on; the default when it is not given, or wrong."""
        self._asked.append(key)
        raw = self._values.get(key)
        if raw is None:
            return default
        try:
            return read(raw)
        except BadValueError as bad:
            for problem in bad.problems:
                self.complain(key, problem)
            return default

    def section(self, key: str) -> ConfigSection:
        """The mapping below a key; empty when it is not given."""
        self._asked.append(key)
        return ConfigSection(self._values.get(key), self._at(key), self.problems)

    def names(self) -> list[str]:
        """Every key that is a text; others are noted."""
        for key in self._values:
            if not isinstance(key, str):
                self.complain(shown(str(key)), "is not a text; write it in quotes")
        return [key for key in self._values if isinstance(key, str)]

    def items(self, key: str) -> Sequence[object]:
        """The list below a key."""
        return self.take(key, _list, ())

    def finish(self, more: Iterable[str] = ()) -> None:
        """Note every key that was never asked for; `more` are known as well."""
        known = (*self._asked, *more)
        for key in self._values:
            if key not in known:
                self.problems.append(
                    f"{self._at(shown(str(key)))}: there is no such key{did_you_mean(str(key), known)}"
                )

    def _at(self, key: str) -> str:
        return f"{self.place}{'' if self.place.endswith(': ') else '.'}{key}"


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise BadValueError(f"{quoted(value)} is not a list")
    return value


def flag(value: object) -> bool:
    """A truth value."""
    return read_bool(value, _ignore)


def text(value: object) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise BadValueError(f"{quoted(value)} is not a string")
    return value.strip()


def path(value: object) -> Path:
    """The path of a file."""
    return Path(text(value))


def whole(low: int, high: int) -> Callable[[object], int]:
    """A reader of whole numbers, both bounds included."""

    def read(value: object) -> int:
        number = whole_number(value)
        if number is None or not low <= number <= high:
            raise BadValueError(f"{quoted(value)} is not a whole number from {low} to {high}")
        return number

    return read


def workers(value: object) -> int:
    """A number of processes, or `auto`: one for each processor that this one may use."""
    if value == "auto":
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    try:
        return whole(1, MAX_WORKERS)(value)
    except BadValueError as bad:
        raise BadValueError([f"{problem}, nor auto" for problem in bad.problems]) from None


def one_of(*words: str) -> Callable[[object], str]:
    """A reader of one of a few words. YAML reads on and off as truth values; they are words here."""

    def read(value: object) -> str:
        word = ("off", "on")[value] if isinstance(value, bool) else value
        if word not in words:
            raise BadValueError(f"{quoted(value)} is not one of {', '.join(words)}")
        return str(word)

    return read


def seconds(value: object) -> float:
    """A time: a number of seconds, or a text with units such as 500ms, 10s or 1h30m."""
    plain = whole_number(value) if isinstance(value, str) else value
    number = plain if isinstance(plain, int | float) and not isinstance(plain, bool) else -1
    if isinstance(value, str) and plain is None:
        with contextlib.suppress(BadValueError):
            number = read_duration(value, _ignore)
    if not 0 <= number < float("inf"):
        raise BadValueError(f"{quoted(value)} is not a time such as 30, 500ms or 1h")
    return float(number)


def networks(value: object) -> NetworkSet:
    """Addresses and networks: a list, or a text with commas. Host bits are an error: somebody may have erred."""
    notes: list[str] = []
    found = NetworkSet(read_networks(value, notes.append))
    if notes:
        raise BadValueError(note.replace("; taken as", "; write") for note in notes)
    return found


def trusted(value: object) -> TrustedSources:
    """Networks, and `unix:` for the peers of unix sockets, as in Kong's trusted_ips.

    A mapping tells who may send PROXY protocol headers and who may send X-Forwarded-For apart.
    """
    if isinstance(value, Mapping):
        return _trusted_apart(value)
    texts = value if isinstance(value, list) else [value]
    items = [part for one in texts for part in (one.split(",") if isinstance(one, str) else [one])]
    rest = [item for item in items if not isinstance(item, str) or item.strip() != UNIX]
    return TrustedSources(networks(rest), unix=len(rest) < len(items))


def name(value: object) -> str:
    """The name of a listener, a service or a secret."""
    found = text(value)
    if not all(char.isalnum() or char in "-_." for char in found) or len(found) > 64:
        raise BadValueError(f"{quoted(value)} is not a name: letters, digits, -, _ and . only, 64 at most")
    return found


def proxy_protocol_version(value: object) -> int:
    """`v1` or `v2`. Raises BadValueError."""
    return int(one_of("v1", "v2")(value)[1])


def access(section: ConfigSection) -> Access:
    """The mapping `access` of a listener or a service."""
    rules = section.section("access")
    allow = rules.take("allow", networks, None)
    found = Access(
        allow or EVERYBODY.allow,
        rules.take("deny", networks, EVERYBODY.deny),
        rules.take("default", one_of("allow", "deny"), "allow" if allow is None else "deny") == "allow",
    )
    rules.finish()
    return found


def _trusted_apart(value: Mapping[object, object]) -> TrustedSources:
    known = ("proxy_protocol", "x_forwarded_for")
    problems = [f"{shown(str(key))} is none of {', '.join(known)}" for key in value if key not in known]
    found = []
    for key in known:
        try:
            found.append(trusted([] if (one := value.get(key)) is None or isinstance(one, Mapping) else one))
        except BadValueError as bad:
            problems += [f"{key}: {problem}" for problem in bad.problems]
    if problems:
        raise BadValueError(problems)
    headers, forwarded = found
    return TrustedSources(headers.networks, headers.unix, x_forwarded_for=forwarded.networks)


def _ignore(_note: str) -> None:
    """Notes that are of no use here."""
