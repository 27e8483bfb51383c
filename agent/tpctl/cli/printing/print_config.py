"""The effective configuration, as `tpctl install --print-config` shows it: YAML that can be given to --config again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tpctl.config.effective import Config
from tpctl.config.inputs import plain
from tpctl.config.options import OPTIONS

_COMMENT_COLUMN = 60


def as_data(config: Config) -> dict[str, dict[str, object]]:
    """By YAML key: the value, and where it came from."""
    config = _effective(config)
    return {
        option.key: {"value": plain(getattr(config, option.name)), "origin": config.origins[option.name]}
        for option in OPTIONS
    }


def as_yaml(config: Config) -> str:
    """kumactl's YAML, each value with its origin as a comment."""
    config = _effective(config)
    tree: dict[str, Any] = {}
    for option in OPTIONS:
        *sections, last = option.key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        value = json.dumps(plain(getattr(config, option.name)), ensure_ascii=False)
        branch[last] = (value, config.origins[option.name])
    return "\n".join(_lines(tree, 0))


def _effective(config: Config) -> Config:
    """Beside a control group, what arrives is not redirected by default; "true" would be refused when given back."""
    if not config.cgroup or config.inbound_include_ports or config.is_given("inbound_enabled"):
        return config
    origins = {**config.origins, "inbound_enabled": config.origins["cgroup"]}
    return config._replace(inbound_enabled=False, origins=origins)


def _lines(tree: Mapping[str, Any], depth: int) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, tuple):
            text, origin = value
            yield f"{'  ' * depth}{key}: {text}".ljust(_COMMENT_COLUMN) + f" # {origin}"
        else:
            yield f"{'  ' * depth}{key}:"
            yield from _lines(value, depth + 1)
