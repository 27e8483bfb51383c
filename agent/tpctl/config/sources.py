"""Where configuration comes from: YAML files, the environment, flags. Each becomes a list of raw values with an origin.

Nothing here knows what a value means; `tpctl.config.load` reads and checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tpctl.config.options import BY_KEY, BY_NAME, BY_VARIABLE, OPTIONS, Option
from tpctl.config.unsupported import UNSUPPORTED, Unsupported
from tpctl.config.values import FALSE, TRUE, quoted, shown
from tpctl.config.yaml_text import parse_yaml
from tpctl.system.input_files import STDIN, UnusableFileError, read_configuration

PREFIXES = ("KUMA_TRANSPARENT_PROXY_", "TPCTL_")
"""Of environment variables; the later one wins."""
NO_POLICY = frozenset({"PROBE"})
"""Variables that the command line itself reads (`tpctl.cli.options.probing`)."""
MAX_COMPLAINTS = 100
"""Of one source. Nobody reads more of them, and to find what each might mean takes its time."""


_MAX_NAME = 100
_NARROWING = ("dataplane_file", "cgroup")
"""Options that leave more of the host alone: a variable that is not set, in a script, must not count as "none"."""


class Given(NamedTuple):
    """A value that somebody gave for an option, not yet read."""

    option: Option
    raw: object
    origin: str
    """As a message begins: "flag --x", "environment TPCTL_X", "file f: a.b"."""


@dataclass(slots=True)
class Findings:
    """What a source holds, and what is wrong with it."""

    given: list[Given] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing when no known word is near."""
    import difflib  # lazily: only a mistake needs it

    if len(word) > _MAX_NAME:
        return ""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.75)
    return f'; did you mean "{by_lower[near[0]]}"?' if near else ""


def from_flags(flags: Mapping[str, Sequence[str]]) -> Findings:
    """Flags by option name, with every occurrence."""
    found = Findings()
    for name, occurrences in flags.items():
        option = BY_NAME[name]
        if name in _NARROWING and not occurrences[-1].strip():
            found.problems.append(
                f'flag {option.flag}: "" names no {option.metavar.lower()}; without the flag more is redirected, so '
                "leave it out if that is what you mean"
            )
            continue
        keep_all = option.accumulates and len(occurrences) > 1
        raw: object = list(occurrences) if keep_all else occurrences[-1]
        if option.flag_negates and isinstance(raw, str):
            raw = _opposite(raw)
        found.given.append(Given(option, raw, f"flag {option.flag}"))
    return found


def _opposite(text: str) -> str:
    """The other truth value; what is none stays, to be refused by the reader."""
    word = text.strip()
    return "false" if word in TRUE else "true" if word in FALSE else text


def from_environment(environ: Mapping[str, str]) -> Findings:
    """The variables with one of the prefixes. An empty variable is an empty list, or, for any other type, not set."""
    found = Findings()
    refused = {row.variable: row for row in UNSUPPORTED}
    for prefix in PREFIXES:
        for variable, value in sorted(environ.items()):
            if not variable.startswith(prefix):
                continue
            suffix = variable.removeprefix(prefix)
            option = BY_VARIABLE.get(suffix)
            if option is not None:
                if value.strip() or option.default == ():
                    found.given.append(Given(option, value, f"environment {variable}"))
            elif suffix in NO_POLICY:
                continue
            elif suffix in refused:
                if _is_used(refused[suffix], value.strip()):
                    found.problems.append(f"environment {variable}: {refused[suffix].reason}")
            elif len(found.notices) < MAX_COMPLAINTS:
                known = (f"{prefix}{row.variable}" for row in OPTIONS)
                hint = did_you_mean(variable, known)
                found.notices.append(f"warning: environment {shown(variable)} is not known and has no effect{hint}")
    return found


def from_files(paths: Iterable[str]) -> Findings:
    """YAML or JSON files in order; `-` is stdin."""
    found = Findings()
    for path in paths:
        if not path:  # a variable that is not set, in somebody's script
            found.problems.append('flag --config: "" is not the path of a file')
            continue
        name = "stdin" if path == STDIN else shown(path)
        try:
            tree = parse_yaml(read_configuration(path))
        except UnusableFileError as error:
            found.problems.append(f"file {name}: {error}")
            continue
        if tree is None:
            continue
        if not isinstance(tree, Mapping):
            kind = "a list" if isinstance(tree, list) else f"the single value {shown(repr(tree))}"
            found.problems.append(
                f"file {name}: holds {kind}; write keys, as in redirect: {{inbound: {{port: 15006}}}}"
            )
            continue
        _walk(tree, name, found)
    return found


def _is_used(row: Unsupported, raw: object) -> bool:
    if row.is_bool:
        return raw not in (None, False, "", "false", "False", "FALSE", "f", "F", "0")
    return raw not in (None, "", [])


def _walk(tree: Mapping[object, object], file: str, found: Findings) -> None:
    """Match the leaves of a file with the table; null means "not set"."""
    refused = {row.key: row for row in UNSUPPORTED if row.key}
    sections = {parent for key in (*BY_KEY, *refused) for parent in _parents(key)}
    for key, raw in _flatten(tree, "", sections):
        if len(found.problems) >= MAX_COMPLAINTS:
            found.problems.append(f"file {file}: there is more, which is not shown here")
            return
        option, origin = BY_KEY.get(key), f"file {file}: {shown(key)}"
        if option is not None:
            if raw is not None:
                found.given.append(Given(option, raw, origin))
        elif key in refused:
            if _is_used(refused[key], raw):
                found.problems.append(f"{origin}: {refused[key].reason}")
        elif key in sections:
            if raw is not None:
                example = next(known for known in BY_KEY if known.startswith(f"{key}."))
                found.problems.append(f"{origin}: {quoted(raw)} is a value where keys are expected, as in {example}")
        else:
            found.problems.append(f"{origin}: there is no such key{did_you_mean(key, (*BY_KEY, *sections))}")


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _flatten(tree: Mapping[object, object], path: str, sections: set[str]) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        here = f"{path}{key}"
        if here in sections and isinstance(value, Mapping):
            yield from _flatten(value, f"{here}.", sections)
        else:
            yield here, value
