"""`tpctl status --prometheus`: the state of this host for the textfile collector of Prometheus' node_exporter. Pure."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from tpctl import __version__
from tpctl.system import exposition

if TYPE_CHECKING:
    from tpctl.arrival.check import Report as Arrival
    from tpctl.change.status import Report
    from tpctl.engines.base import RuleCounter

_PREFIX = "tpctl_"
_RULE = re.compile(r"^(?:tpctl/)?([a-z]\d)(?: to ([a-z]\d))?\b")
_WORD = re.compile(r"[^a-z0-9]+")
_FATES = ("arrived", "refused", "lost", "passed_by")

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


def render(report: Report, arrival: Arrival | None, now: float) -> str:
    """Everything that `tpctl status` knows as numbers; `now` is of time.time()."""
    lines = [line for name, text, samples in _gauges(report, now) for line in _metric(name, "gauge", text, samples)]
    if arrival is not None:
        lines += _probes(arrival)
    lines += _metric("rule_packets_total", "counter", "Packets by rule of docs/ruleset.md.", _rules(report, "packets"))
    lines += _metric("rule_bytes_total", "counter", "Bytes by rule of docs/ruleset.md.", _rules(report, "bytes"))
    return "\n".join([*lines, ""])


def _gauges(report: Report, now: float) -> Iterator[tuple[str, str, list[Sample]]]:
    record, found, pending = report.record, report.inspection, report.pending
    yield "build_info", "The version of tpctl that tells this.", [({"version": __version__}, 1)]
    engine: Labels = {"engine": found.engine, "variant": found.variant or ""} if found.installed else {}
    yield "installed", "Whether a redirection is installed.", [(engine, int(found.installed))]
    installed_at = _seconds(record.installed_at) if record else None
    yield "installed_timestamp_seconds", "When it was installed.", _known(installed_at)
    yield "drift", "Whether the kernel's rules differ from the plan.", [({}, int(bool(found.drift)))]
    yield "problems", "What `tpctl status` calls a problem.", [({}, len(report.problems))]
    yield "warnings", "What may go wrong later.", [({}, len(report.warnings))]
    up: list[Sample] = [
        ({"role": port.role, "protocol": str(port.protocol), "port": str(port.port)}, int(bool(port.uids)))
        for port in report.ports
    ]
    yield "listener_up", "Whether something listens on a port of the data plane.", up
    fit: list[Sample] = [
        (labels, int(port.problem is None)) for (labels, _), port in zip(up, report.ports, strict=True)
    ]
    yield "listener_fit", "Whether what listens there takes all that is redirected there.", fit
    yield "confirm_pending", "Whether a change awaits `tpctl confirm`.", [({}, int(pending is not None))]
    left = max(pending.remaining, 0) if pending else None
    yield "confirm_remaining_seconds", "How long it is waited for.", _known(left)
    trace = report.taken_back
    taken_back = _seconds(trace.at) if trace else None
    yield (
        "taken_back_timestamp_seconds",
        "When the last change was taken back: nobody confirmed it.",
        _known(taken_back),
    )
    yield "draining_connections", "Connections that an uninstall lets finish.", [({}, report.draining)]
    if report.next_boot is not None:
        yield "next_boot", "Whether the next boot installs it again.", [({}, int(bool(report.next_boot)))]
    figures: list[Sample] = [({"figure": _word(figure.name)}, figure.value) for figure in found.figures]
    yield "engine_figure", "What the engine counts.", figures
    most: list[Sample] = [
        ({"figure": _word(figure.name)}, figure.most) for figure in found.figures if figure.most is not None
    ]
    yield "engine_figure_most", "How much of it there can be.", most
    yield "status_timestamp_seconds", "When this was told.", [({}, round(now))]


def _probes(arrival: Arrival) -> Iterator[str]:
    told: dict[tuple[str, ...], tuple[Labels, str, float]] = {}
    for one in arrival.results:
        probe = one.probe
        labels = {
            "kind": _word(probe.kind),
            "direction": str(probe.direction),
            "family": f"ipv{int(probe.family)}",
            "protocol": str(probe.connection.protocol),
        }
        told[tuple(labels.values())] = (labels, _word(one.outcome.fate), one.outcome.seconds)
    fates = [({**labels, "fate": fate}, int(fate == found)) for labels, found, _ in told.values() for fate in _FATES]
    yield from _metric("probe_fate", "gauge", "How the last probe of `tpctl check` ended: 1 for its fate.", fates)
    times = [(labels, round(seconds, 6)) for labels, _, seconds in told.values()]
    yield from _metric("probe_seconds", "gauge", "How long it took.", times)


def _rules(report: Report, what: str) -> list[Sample]:
    """The counters, those of the same rule together: it may be several for the kernel."""
    sums: dict[tuple[tuple[str, str], ...], int] = {}
    for counter in report.inspection.counters:
        labels = tuple(_labels(counter).items())
        sums[labels] = sums.get(labels, 0) + int(getattr(counter, what))
    return [(dict(labels), value) for labels, value in sums.items()]


def _labels(counter: RuleCounter) -> dict[str, str]:
    family = f"ipv{counter.family}" if counter.family else ""
    return {"family": family, "table": counter.table, "chain": counter.chain, "rule": _rule(counter.rule)}


def _rule(text: str) -> str:
    """The name of a rule ("o7", "i3_to_i7"), or its text as one word where it has none."""
    found = _RULE.match(text)
    if found is None:
        return _word(text.removeprefix("tpctl/"))
    return f"{found[1]}_to_{found[2]}" if found[2] else found[1]


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    lines = [exposition.line(f"{_PREFIX}{name}", labels, _number(value)) for labels, value in samples]
    if lines:
        yield from exposition.head(f"{_PREFIX}{name}", kind, text)
        yield from lines


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")


def _known(value: float | None) -> list[Sample]:
    return [] if value is None else [({}, value)]


def _seconds(at: str) -> float | None:
    """A moment of a record in seconds since 1970; None where it is none."""
    try:
        return datetime.datetime.fromisoformat(at).timestamp()
    except ValueError:
        return None


def _word(text: str) -> str:
    return _WORD.sub("_", text.lower()).strip("_")
