"""Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats), line by line. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def head(metric: str, kind: str, text: str) -> Iterator[str]:
    """What stands before the samples of a metric."""
    yield f"# HELP {metric} {text}"
    yield f"# TYPE {metric} {kind}"


def line(metric: str, labels: Mapping[str, str], value: float | str) -> str:
    """One sample."""
    inner = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{metric}{{{inner}}} {value}" if inner else f"{metric} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
