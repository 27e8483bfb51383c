"""A `picture.Picture` as SVG, which any browser shows and any ticket takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from tpctl.cli.printing.picture import Box, Picture

_MARGIN, _TITLE, _GAP, _ARROW = 20, 34, 26, 46
_LEFT, _HEIGHT = 120, 50
"""The column of the lanes' titles, and the height of a box."""
_CHARACTER, _LINE = 7.3, 18
"""About what a character of 12 px takes, and a line."""
_FEWEST = 12
_FILLS = {"end": "#ffffff", "hook": "#e8ecff", "plane": "#dcf5dc", "down": "#ffdcdc"}


def as_svg(shown: Picture) -> str:
    """The whole document."""
    columns = max((len(lane.boxes) for lane in shown.lanes), default=0)
    widths = [
        _width([lane.boxes[column] for lane in shown.lanes if column < len(lane.boxes)]) for column in range(columns)
    ]
    boxes = _LEFT + sum(widths) + _ARROW * max(columns - 1, 0)
    notes = max((_LEFT + _CHARACTER * len(what) for _, what in shown.notes), default=0)
    width = round(2 * _MARGIN + max(boxes, notes, _CHARACTER * 1.3 * len(shown.title)))
    top_of_notes = _MARGIN + _TITLE + len(shown.lanes) * (_HEIGHT + _GAP)
    height = round(top_of_notes + len(shown.notes) * _LINE + _MARGIN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(shown.title)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L10 5L0 10z"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(_MARGIN, _MARGIN + 14, shown.title, size=15, weight="bold"),
    ]
    for number, lane in enumerate(shown.lanes):
        top = _MARGIN + _TITLE + number * (_HEIGHT + _GAP)
        lines.append(_text(_MARGIN, top + _HEIGHT / 2 + 4, lane.title, weight="bold"))
        lines += _boxes(lane.boxes, widths, top)
    for number, (word, what) in enumerate(shown.notes):
        y = top_of_notes + number * _LINE + 10
        lines += [_text(_MARGIN, y, word, weight="bold"), _text(_MARGIN + _LEFT, y, what)]
    return "\n".join([*lines, "</svg>", ""])


def _width(boxes: list[Box]) -> float:
    return _CHARACTER * max(_FEWEST, *(len(text) for box in boxes for text in (box.name, box.detail))) + 16


def _boxes(boxes: tuple[Box, ...], widths: list[float], top: float) -> Iterator[str]:
    left = float(_MARGIN + _LEFT)
    for number, (box, width) in enumerate(zip(boxes, widths, strict=False)):
        if number:
            y = top + _HEIGHT / 2
            yield (
                f'<line x1="{left - _ARROW + 3:.0f}" y1="{y:.0f}" x2="{left - 3:.0f}" y2="{y:.0f}" stroke="#333333" '
                'stroke-width="1.5" marker-end="url(#arrow)"/>'
            )
        yield (
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{_HEIGHT}" rx="6" '
            f'fill="{_FILLS[box.kind]}" stroke="#555555"/>'
        )
        middle = left + width / 2
        y = top + _HEIGHT / 2 + (-4 if box.detail else 4)
        yield _text(middle, y, box.name, weight="bold", anchor="middle")
        if box.detail:
            yield _text(middle, y + 17, box.detail, anchor="middle", fill="#444444")
        left += width + _ARROW


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = "#000000",
) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
