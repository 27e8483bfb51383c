"""Copies of the administrator's certificates, keys and secrets, which are what Envoy reads.

Envoy can watch the originals itself. It would take whatever is renamed onto them, an emptied secret for instance (and
refuse everybody), a key without its certificate, and nothing that is written in place. So each is read here, judged,
and copied; a new content gets a new path, and Envoy takes all files of a secret at the same moment, when its SDS file
names the new paths. No document holds a secret itself: Envoy prints documents that it cannot read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tpctl.envoy.documents import Documents, Resource
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError, read_bytes

MAX_BYTES = 1024 * 1024
"""Of a file. The authorities of a distribution have a quarter of that."""
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Secret:
    """A resource, the files it named, and the one that names the copies."""

    original: Resource
    contents: Mapping[str, bytes]
    """By the paths of the originals."""
    copied: Resource
    folder: str
    """Of the copies, below the whole folder."""
    copies: Mapping[str, str]
    """The paths of the originals by those of their copies."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Documents whose secrets are copies."""

    documents: Documents
    secrets: Mapping[str, Secret] = field(default_factory=dict)

    def originals(self) -> dict[str, str]:
        """The paths of the administrator's files by those of the copies."""
        return {copy: path for secret in self.secrets.values() for copy, path in secret.copies.items()}


def stage(documents: Documents, folder: Path, before: Staged | None, put: Callable[[str, bytes], None]) -> Staged:
    """Copy what is new since `before` with `put`. Raises InputError with every file that cannot be used."""
    problems: list[str] = []
    secrets: dict[str, Secret] = {}
    for original in documents.secrets:
        name = str(original["name"])
        contents = _contents(original, problems)
        known = before.secrets.get(name) if before else None
        if known is not None and (known.original, known.contents) == (original, contents):
            secrets[name] = known
        elif not problems:
            secrets[name] = _copied(original, contents, folder)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    for secret in secrets.values():
        if before is None or before.secrets.get(str(secret.original["name"])) is not secret:
            for copy, path in secret.copies.items():
                put(str(PurePosixPath(copy).relative_to(folder)), secret.contents[path])
    order = _in_order(secrets, before.secrets if before else {})
    return Staged(documents._replace(secrets=[secrets[name].copied for name in order]), secrets)


def _in_order(coming: Mapping[str, Secret], present: Mapping[str, Secret]) -> list[str]:
    """The names of secrets in the order in which Envoy should get them: a value that stays is known all the time.

    Of two secrets of which either is accepted, the value of the first becomes that of the second when it is replaced.
    So the second comes before the first: in the other order, the value would be refused for a moment. Values that move
    in a circle, as when two are exchanged, have no such order.
    """
    now = {name: _value(secret) for name, secret in present.items()}
    then = {name: _value(secret) for name, secret in coming.items()}
    staying = set(now.values()) & set(then.values())
    left = [name for name, secret in coming.items() if present.get(name) is not secret]
    order = [name for name in coming if name not in left]
    while left:
        held = Counter(now.values())
        safe = [name for name in left if now.get(name) not in staying or held[now[name]] > 1] or left
        # First those that take over a value whose present holder is going to be replaced.
        following = next((name for name in safe if any(now.get(one) == then[name] for one in left)), safe[0])
        now[following] = then[following]
        left.remove(following)
        order.append(following)
    return order


def _value(secret: Secret) -> tuple[bytes, ...]:
    return tuple(secret.contents.values())


def files_of(resource: Any) -> Iterator[str]:
    """The paths that a message names as sources of data (core.v3.DataSource)."""
    if isinstance(resource, dict):
        for key, value in resource.items():
            if key == "filename":
                yield value
            else:
                yield from files_of(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from files_of(value)


def _contents(resource: Resource, problems: list[str]) -> dict[str, bytes]:
    found = {}
    for path in files_of(resource):
        try:
            content = read_bytes(path, MAX_BYTES)
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        except UnusableFileError as error:
            problems.append(f"{path}: {error}")
            continue
        if "generic_secret" in resource:
            content = content.rstrip(b"\r\n")  # of which the formatter of Envoy's would make a part of the secret
        if not content.strip():
            problems.append(f"{path}: is empty")
        found[path] = content
    return found


def _copied(original: Resource, contents: Mapping[str, bytes], folder: Path) -> Secret:
    place = f"sds/{original['name']}/{next(_numbers)}"
    copies = {path: str(folder / place / f"{number}-{Path(path).name}") for number, path in enumerate(contents)}
    return Secret(original, contents, _renamed(original, copies), place, {copy: path for path, copy in copies.items()})


def _renamed(value: Any, copies: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: copies[one] if key == "filename" else _renamed(one, copies)
            for key, one in value.items()
            if key != "watched_directory"  # a copy never changes
        }
    return [_renamed(one, copies) for one in value] if isinstance(value, list) else value
