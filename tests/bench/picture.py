"""Bar charts as SVG, without a library: one panel for each measurement, with the spread as a line. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_COLUMNS = 3
_WIDTH, _BAR, _GAP = 300, 18, 6
_LABEL, _MARGIN, _TITLE = 62, 16, 26
_OWN, _OTHER, _NONE = "#2a6fdb", "#9aa5b1", "#d5dae0"


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: the measurements by name, in order."""

    title: str
    values: Mapping[str, Sequence[float]]
    less_is_better: bool = False


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _height(panel: Panel) -> int:
    return _TITLE + len(panel.values) * (_BAR + _GAP) + _MARGIN


def _panel(panel: Panel, x: int, y: int) -> list[str]:
    room = _WIDTH - _LABEL - 60
    most = max(max(values) for values in panel.values.values()) or 1.0
    title = escape(panel.title) + (" (less is better)" if panel.less_is_better else "")
    parts = [f'<text x="{x}" y="{y + 14}" class="t">{title}</text>']
    for row, (name, values) in enumerate(panel.values.items()):
        top = y + _TITLE + row * (_BAR + _GAP)
        middle = statistics.median(values)
        low, high = (x + _LABEL + room * value / most for value in (min(values), max(values)))
        colour = {"relay": _OWN, "none": _NONE}.get(name, _OTHER)
        line = top + _BAR / 2
        parts += [
            f'<text x="{x + _LABEL - 6}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{x + _LABEL}" y="{top}" width="{room * middle / most:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{line}" y2="{line}" stroke="#333"/>',
            f'<text x="{high + 5:.1f}" y="{top + 13}">{_number(middle)}</text>',
        ]
    return parts


def picture(panels: Sequence[Panel], note: str) -> str:
    """All panels, and below them how they were measured."""
    parts: list[str] = []
    y = _MARGIN
    for start in range(0, len(panels), _COLUMNS):
        row = panels[start : start + _COLUMNS]
        for column, panel in enumerate(row):
            parts += _panel(panel, _MARGIN + column * (_WIDTH + _MARGIN), y)
        y += max(_height(panel) for panel in row)
    parts.append(f'<text x="{_MARGIN}" y="{y + 8}" fill="#666">{escape(note)}</text>')
    width, height = _MARGIN + _COLUMNS * (_WIDTH + _MARGIN), y + _MARGIN + 8
    style = "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
