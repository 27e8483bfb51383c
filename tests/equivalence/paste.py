"""Policies and connections as code, to be pasted into test_pinned.py: fields that have their default are left out."""

from __future__ import annotations

import dataclasses
import enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any


def as_code(value: Any) -> str:
    """An expression that evaluates to the value, in the names of tpctl.spec.policy, tpctl.spec.decide and ipaddress."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, IPv4Address | IPv6Address):
        return f'ip_address("{value}")'
    if isinstance(value, IPv4Network | IPv6Network):
        return f'ip_network("{value}")'
    if isinstance(value, tuple):
        return f"({''.join(f'{as_code(item)}, ' for item in value).rstrip(' ' if len(value) == 1 else ', ')})"
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(as_code(item) for item in sorted(value))}}})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(_arguments(value))})"
    return repr(value)


def _arguments(value: Any) -> list[str]:
    found = []
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is dataclasses.MISSING or held != default:
            found.append(f"{field.name}={as_code(held)}")
    return found
