"""Makes the policy of a disagreement small: a field after the other goes back to its default while it stays wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tpctl.spec.policy import Policy

_KEPT = ("proxy_uid", "families")


def shrunk(policy: Policy, is_wrong: Callable[[Policy], bool], most: int = 300) -> Policy:
    """The smallest policy found in at most so many trials for which `is_wrong` still holds."""
    trials = 0
    progress = True
    while progress:
        progress = False
        for candidate in simpler(policy):
            trials += 1
            if trials > most:
                return policy
            if is_wrong(candidate):
                policy, progress = candidate, True
                break
    return policy


def simpler(value: Any) -> Iterator[Any]:
    """The same value with one thing less, big things first."""
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is dataclasses.MISSING or held == default or field.name in _KEPT:
            continue
        yield dataclasses.replace(value, **{field.name: default})
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if isinstance(held, tuple):
            for smaller in _fewer(held):
                yield dataclasses.replace(value, **{field.name: smaller})
        elif dataclasses.is_dataclass(held):
            for part in simpler(held):
                yield dataclasses.replace(value, **{field.name: part})


def _fewer(items: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    half = len(items) // 2
    if half > 1:
        yield items[:half]
        yield items[half:]
    if len(items) > 1:
        yield from (items[:index] + items[index + 1 :] for index in range(len(items)))
    for index, item in enumerate(items):
        if dataclasses.is_dataclass(item) and any(isinstance(getattr(item, f.name), tuple) for f in _fields(item)):
            for part in simpler(item):
                yield (*items[:index], part, *items[index + 1 :])


def _fields(item: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(item)
