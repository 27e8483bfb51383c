"""Readers of single configuration values: from what YAML, a variable or a flag holds to a value of the policy.

Every reader takes the raw value and a function to note what was changed about it, and raises `BadValueError` with a
line for each thing that is wrong. None of them knows where the value came from; `tpctl.config.load` adds that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from tpctl.spec.policy import MAX_PORT
from tpctl.system.text import on_one_line, without_surrogates

Note = Callable[[str], None]
Reader = Callable[[object, Note], object]
T = TypeVar("T")

TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
"""The spellings of Go's strconv.ParseBool, which kumactl's flags and variables use."""

EXECUTABLES = tuple(f"{tool}{suffix}" for tool in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore"))
MAX_SHOWN = 160
"""Characters of a value in a message."""

_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_LONGEST = 2**63 - 1
"""Nanoseconds of Go's time.Duration, and of what time.sleep takes."""
_SUSPICIOUSLY_SHORT_NANOSECONDS = 10**6


class BadValueError(ValueError):
    """A value that cannot be read; `problems` has one line each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


def quoted(value: object) -> str:
    """A value as it stands in a message."""
    return f'"{shown(value)}"' if isinstance(value, str) else shown(repr(value))


def shown(text: str) -> str:
    """A text of somebody else's on one line of a message: nothing a terminal would obey, and not without an end."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
    return on_one_line(short)


def read_bool(value: object, note: Note) -> bool:
    """A truth value, in the spellings of YAML and of Go."""
    if isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else None
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise BadValueError(f"{quoted(value)} is neither true nor false")


def read_text(value: object, note: Note) -> str:
    """A string; a number is taken as its digits, so that a uid needs no quotes in YAML."""
    if isinstance(value, str) and value.strip().isprintable():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadValueError(f"{quoted(value)} is not a string")


def read_user(value: object, note: Note) -> str:
    """The name or uid of a user; "" for the default one, and blanks for nobody, as for kumactl."""
    if not isinstance(value, str):
        return read_text(value, note)
    user = value.strip()
    if (value and not user) or not without_surrogates(user).isprintable():  # names may be no UTF-8
        raise BadValueError(f"{quoted(value)} is neither the name nor the uid of a user")
    return user


def read_path(value: object, note: Note) -> str:
    """The path of a file."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise BadValueError(f"{quoted(value)} is not the path of a file")


def read_cgroup(value: object, note: Note) -> str:
    """A control group's path from the root of the hierarchy, or "" for none.

    That of its directory under /sys/fs/cgroup will do too.
    """
    if value == "":
        return ""
    text = value.strip() if isinstance(value, str) else ""
    path = text.removeprefix("/sys/fs/cgroup").strip("/")
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or not path.isprintable() or '"' in path:
        raise BadValueError(f"{quoted(value)} is not the path of a control group, such as system.slice/app.service")
    return path


def whole_number(value: object) -> int | None:
    """The number `value` is or spells in plain decimal digits, or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value.strip()):
        return int(value.strip())
    return None


class Number:
    """A reader of whole numbers from `low` to `high`, both included."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def __call__(self, value: object, note: Note) -> int:
        result = whole_number(value)
        if result is None or not self.low <= result <= self.high:
            raise BadValueError(f"{quoted(value)} is not a whole number from {self.low} to {self.high}")
        return result


class Choice:
    """A reader of one of a few words, whatever their case."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def __call__(self, value: object, note: Note) -> str:
        if isinstance(value, str) and value.strip().lower() in self.allowed:
            return value.strip().lower()
        raise BadValueError(f"{quoted(value)} is not one of {', '.join(self.allowed)}")


def read_port(value: object, note: Note) -> int:
    """One TCP or UDP port."""
    result = whole_number(value)
    if result is None or not 1 <= result <= MAX_PORT:
        raise BadValueError(f"{quoted(value)} is not a port (1-{MAX_PORT})")
    return result


def read_duration(value: object, note: Note) -> float:
    """A time in seconds, from Go's notation ("2s", "1m30s", "500ms") or, as kumactl takes it, nanoseconds."""
    text = value.strip().strip('"') if isinstance(value, str) else value
    nanoseconds = whole_number(text)
    if nanoseconds is not None:
        if 0 < nanoseconds < _SUSPICIOUSLY_SHORT_NANOSECONDS:
            note(f"{nanoseconds} is taken as nanoseconds, as by kumactl; for seconds write {nanoseconds}s")
        if 0 <= nanoseconds <= _LONGEST:
            return nanoseconds / 10**9
    if isinstance(text, str) and text and not _DURATION_PART.sub("", text):
        length = sum(float(part) * _NANOSECONDS[unit] for part, unit in _DURATION_PART.findall(text))
        if length <= _LONGEST:
            return length / 10**9
        raise BadValueError(f"{quoted(value)} is longer than 292 years")
    raise BadValueError(f"{quoted(value)} is not a duration such as 2s, 500ms or 1m")


def read_executables(value: object, note: Note) -> dict[str, str]:
    """Paths of the iptables programs: a mapping, or a text `iptables:/path,iptables-save:/path,...`."""
    pairs: list[tuple[object, object]] = []
    values = isinstance(value, Mapping)
    if isinstance(value, Mapping):
        pairs.extend(value.items())
    else:
        pairs.extend((name, path) for name, _, path in (str(item).partition(":") for item in filled(value, note)))
    problems = []
    for name, path in pairs:
        if name not in EXECUTABLES:
            problems.append(f"{quoted(name)} is not one of {', '.join(EXECUTABLES)}")
        elif not isinstance(path, str | None) or not (path or "").isprintable() or (path, values) == ("", False):
            problems.append(f"{name}: {quoted(path)} is not the path of a program")
    if problems:
        raise BadValueError(problems)
    return {str(name): str(path) for name, path in pairs if path}


def read_variables(value: object, note: Note) -> dict[str, str]:
    """Names and values: a mapping, or texts `name=value`."""
    if isinstance(value, Mapping):
        return {str(name): str(one) for name, one in value.items()}
    found: dict[str, str] = {}
    for item in items(value):
        name, equals, text = str(item).partition("=")
        if not name.strip() or not equals:
            raise BadValueError(f"{quoted(item)} is not NAME=VALUE")
        found[name.strip()] = text
    return found


def items(value: object) -> list[object]:
    """The items of a list value; texts are split at commas. An empty text is an empty list, an empty item an error."""
    found = _split(value)
    if "" in found:
        raise BadValueError(f"{quoted(value)} has an empty item")
    return found


def filled(value: object, note: Note) -> list[Any]:
    """The items of a list value but the empty ones, with a note if there are any."""
    found = _split(value)
    kept = [item for item in found if item != ""]
    if len(kept) < len(found):
        note(f"{quoted(value)} has an empty item, which is skipped, as by kumactl")
    return kept


def _split(value: object) -> list[object]:
    found: list[object] = []
    if isinstance(value, str) and not value.strip():
        return found
    for entry in value if isinstance(value, list | tuple) else [value]:
        found.extend([part.strip() for part in entry.split(",")] if isinstance(entry, str) else [entry])
    return found


def each(raw: Iterable[object], read: Callable[[object, Note], T], note: Note) -> tuple[T, ...]:
    """Every item read and in order, without repetitions; all problems together."""
    results: dict[T, None] = {}
    problems: list[str] = []
    for item in raw:
        try:
            results[read(item, note)] = None
        except BadValueError as bad:
            problems.extend(bad.problems)
    if problems:
        raise BadValueError(problems)
    return tuple(results)
