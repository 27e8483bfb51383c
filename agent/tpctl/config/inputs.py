"""A configuration as plain data, for the record: what was given and by whom, to be resolved again on a changed host.

What the configuration took from files is in it, so they are not read again. Defaults are left out: they are the
program's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpctl.config.effective import Config
from tpctl.config.load import of_given
from tpctl.config.options import BY_KEY, OPTIONS, Option
from tpctl.config.sources import Given
from tpctl.spec.policy import PortRange

NOT_KEPT = frozenset({"dataplane_file", "dataplane_variables", "dry_run", "verbose"})
"""What has become other options' values, or concerns one run only."""


def to_document(config: Config) -> dict[str, Any]:
    """The values that were given, by YAML key, with their origins. JSON types."""
    return {
        option.key: {"value": plain(getattr(config, option.name)), "origin": config.origins[option.name]}
        for option in OPTIONS
        if config.is_given(option.name) and option.name not in NOT_KEPT
    }


def from_document(document: Mapping[str, Any]) -> Config:
    """The configuration that `to_document` was given. Keys that this version does not know are passed over.

    Raises InputError when a value cannot be read, KeyError or TypeError when it is no such document.
    """
    return of_given(list(_given(document)))


def _given(document: Mapping[str, Any]) -> Iterator[Given]:
    for key, held in document.items():
        option: Option | None = BY_KEY.get(key)
        if option is not None:
            yield Given(option, held["value"], str(held["origin"]))


def plain(value: object) -> object:
    """A value in the types of JSON, which its option's reader takes back."""
    if isinstance(value, float):
        return _duration(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, PortRange) and value.first == value.last:
        return value.first
    return value if isinstance(value, bool | int | str | Mapping) else str(value)


def _duration(seconds: float) -> str:
    nanoseconds = round(seconds * 10**9)
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if nanoseconds % size == 0:
            return f"{nanoseconds // size}{unit}"
    return f"{nanoseconds}ns"
