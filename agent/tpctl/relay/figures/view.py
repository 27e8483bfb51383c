"""How `tpctl top` shows a `View`: lines for people, a document for scripts. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tpctl.relay.connections.states import Ending
from tpctl.relay.figures.reckoning import ClientView, Counter, ListenerView, View

_UNITS = ("B", "kB", "MB", "GB", "TB")
_STEP = 1000
_DNS_KINDS = ("udp", "tcp", "local", "forwarded", "failed", "timeouts")
"""Those with a rate of their own in the line about DNS."""
_HEADINGS = ("LISTENER", "DIRECTION", "ADDRESS", "OPEN", "NEW/S", "UP/S", "DOWN/S", "ERRORS/S")
_TEXTS = 3
"""Columns that are words; the others are numbers."""


def lines(view: View, where: str, now: float) -> list[str]:
    """The whole picture. `now` is of time.time()."""
    shown = [_head(view, where, now), "", *_table([_HEADINGS, *(_row(one) for one in view.listeners)])]
    if any(one.direction == "dns" for one in view.listeners):
        rates = "  ".join(f"{kind} {_rate(view.dns[kind].rate)}" for kind in _DNS_KINDS if kind in view.dns)
        shown += ["", f"DNS queries/s: {rates}"]
    if view.clients:
        shown += ["", *_table([_HEAD_OF_CLIENTS, *(_client(one) for one in view.clients)])]
    reasons = [_HEAD_OF_REASONS, *(row for one in view.listeners for row in _reasons(one))]
    if len(reasons) > 1:
        shown += ["", *_table(reasons)]
    notes = [f"accepting paused {view.accept_pauses} times"] if view.accept_pauses else []
    if view.reloads or view.refused_reloads:
        notes.append(f"configuration reloads: {view.reloads} used, {view.refused_reloads} refused")
    return [*shown, *([""] if notes else []), *notes]


_HEAD_OF_CLIENTS = ("CLIENT", "", "", "OPEN", "UP", "DOWN")
_HEAD_OF_REASONS = ("NOT IN ORDER", "REASON", "", "IN ALL", "/S")


def fit(shown: Sequence[str], columns: int, rows: int) -> list[str]:
    """The part that a terminal has room for."""
    return [line[:columns].rstrip() for line in shown[:rows]]


def document(view: View, where: str) -> dict[str, Any]:
    """For scripts. Rates are a second, null as long as they are not known; bytes are bytes."""
    return {
        "metrics": where,
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(view.since)),
        "workers": view.workers,
        "draining": view.draining,
        "acceptPauses": view.accept_pauses,
        "reloads": {"used": view.reloads, "refused": view.refused_reloads},
        "listeners": [
            {
                "name": one.name,
                "direction": one.direction,
                "listen": one.listen,
                "open": one.open,
                "accepted": _counter(one.accepted),
                "bytesToUpstream": _counter(one.to_upstream),
                "bytesToClient": _counter(one.to_client),
                "broughtBack": one.brought_back,
                "ended": _counters(one.ended),
                "refused": _counters(one.refused),
            }
            for one in view.listeners
        ],
        "dns": _counters(view.dns),
        "clients": [
            {"client": one.name, "open": one.open, "bytesToUpstream": one.to_upstream, "bytesToClient": one.to_client}
            for one in view.clients
        ],
    }


def size(number: float) -> str:
    """Bytes for people, in powers of 1000: "1.2 MB"."""
    value, unit = float(number), 0
    while value >= _STEP - 0.5 and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit and value < 100 else f"{value:.0f} {_UNITS[unit]}"


def _head(view: View, where: str, now: float) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.since))
    workers = "1 worker" if view.workers == 1 else f"{view.workers} workers"
    state = f"draining ({view.draining} of {view.workers})" if view.draining else "serving"
    return f"relay at {where}: {state}, {workers}, since {began} ({_age(now - view.since)})"


def _age(seconds: float) -> str:
    whole = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"


def _row(one: ListenerView) -> tuple[str, ...]:
    if one.direction == "dns":
        return (one.name, one.direction, one.listen, "", "", "", "", "")
    up, down = (_size(counter.rate) for counter in (one.to_upstream, one.to_client))
    rates = (_rate(one.accepted.rate), up, down, _rate(one.errors.rate))
    return (one.name, one.direction, one.listen, str(one.open), *rates)


def _client(one: ClientView) -> tuple[str, ...]:
    return (one.name, "", "", str(one.open), size(one.to_upstream), size(one.to_client))


def _reasons(one: ListenerView) -> list[tuple[str, ...]]:
    rows = [(_said(reason), counter) for reason, counter in one.ended.items() if reason != "closed"]
    rows += [(f"refused: {reason.replace('_', ' ')}", counter) for reason, counter in one.refused.items()]
    rows.sort(key=lambda row: -row[1].total)
    found: list[tuple[str, ...]] = [
        (one.name, reason, "", str(counter.total), _rate(counter.rate)) for reason, counter in rows
    ]
    if one.brought_back:
        found.append((one.name, "dials brought back to the relay, and dialled again", "", str(one.brought_back), ""))
    return found


def _said(reason: str) -> str:
    """Why connections ended, in words; whatever else may answer there says it in its own."""
    return str(Ending.__members__.get(reason.upper(), reason))


def _camel(word: str) -> str:
    """A word of a label as a name in JSON."""
    first, *rest = word.split("_")
    return first + "".join(map(str.capitalize, rest))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = []
    for row in rows:
        cells = [
            text.ljust(width) if column < _TEXTS else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        shown.append("  ".join(cells).rstrip())
    return shown


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _size(rate: float | None) -> str:
    return "-" if rate is None else size(rate)


def _counter(counter: Counter) -> dict[str, float | None]:
    return {"total": counter.total, "perSecond": None if counter.rate is None else round(counter.rate, 3)}


def _counters(counters: Mapping[str, Counter]) -> dict[str, dict[str, float | None]]:
    return {_camel(name): _counter(counter) for name, counter in counters.items()}
