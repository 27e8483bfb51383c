"""What `tpctl top` shows, from two readings of the relay's metrics. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PREFIX = "tpctl_relay_"
_LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_LARGEST = 1e20
"""Counters have 64 bits."""
_LATEST = 253402300799.0
"""The end of the year 9999, beyond which time.gmtime() fails."""
_MOST_CLIENTS = 16
"""The relay tells no more; whatever else may answer there."""
_ORDERLY = "closed"
"""The one reason of an end that is no error."""

Labels = frozenset[tuple[str, str]]


class NotARelayError(Exception):
    """What answered has other figures than a relay."""


class Figures:
    """The samples of one answer in Prometheus' text format; other lines than the relay's are passed over."""

    def __init__(self, text: str) -> None:
        """Raises NotARelayError."""
        self._samples: dict[str, dict[Labels, float]] = {}
        self._by_pair: dict[tuple[str, str, str], list[Labels]] = {}
        """Name and one label with its value: a listener's figures are found without going through all listeners'."""
        for line in text.splitlines():
            found = _LINE.fullmatch(line)
            if found and found[1].startswith(_PREFIX):
                labels = frozenset((name, _unescaped(value)) for name, value in _LABEL.findall(found[2] or ""))
                self._keep(found[1].removeprefix(_PREFIX), labels, _number(found[3]))
        if "workers" not in self._samples:
            raise NotARelayError("what answers there is not a tpctl relay")

    def _keep(self, name: str, labels: Labels, value: float) -> None:
        samples = self._samples.setdefault(name, {})
        if labels not in samples:
            for label, held in labels:
                self._by_pair.setdefault((name, label, held), []).append(labels)
        samples[labels] = value

    def get(self, name: str, **labels: str) -> float:
        """One figure; 0 when there is none."""
        return self._samples.get(name, {}).get(frozenset(labels.items()), 0.0)

    def by(self, name: str, label: str, **others: str) -> dict[str, float]:
        """The figures of a name by the value of one label, in the order of the values."""
        samples = self._samples.get(name, {})
        candidates = [self._by_pair.get((name, *other), []) for other in others.items()]
        found = {}
        for labels in min(candidates, key=len) if candidates else list(samples):
            named = dict(labels)
            if label in named and others.items() <= named.items():
                found[named[label]] = samples[labels]
        return dict(sorted(found.items()))

    def names(self, name: str, label: str) -> list[str]:
        """The values of a label, in the order of the text."""
        return [labels[label] for labels in self.labels(name) if label in labels]

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of every figure of a name, in the order of the text."""
        return [dict(labels) for labels in self._samples.get(name, {})]


@dataclass(frozen=True, slots=True)
class Counter:
    """Something that is counted from the relay's start."""

    total: int
    rate: float | None
    """A second, between the last two readings; None as long as there is only one."""


@dataclass(frozen=True, slots=True)
class ListenerView:
    """One listener. A DNS listener has no connections of its own; its queries are in `View.dns`."""

    name: str
    direction: str
    listen: str
    open: int
    accepted: Counter
    to_upstream: Counter
    to_client: Counter
    """Bytes."""
    brought_back: int
    ended: Mapping[str, Counter]
    refused: Mapping[str, Counter]
    """By reason, only those that have happened."""

    @property
    def errors(self) -> Counter:
        """Connections that were refused, or ended otherwise than by both sides closing them."""
        counters = [*(one for reason, one in self.ended.items() if reason != _ORDERLY), *self.refused.values()]
        rates = [one.rate for one in counters if one.rate is not None]
        known = len(rates) == len(counters) and self.accepted.rate is not None
        return Counter(sum(one.total for one in counters), sum(rates) if known else None)


@dataclass(frozen=True, slots=True)
class ClientView:
    """The connections that a client has at this moment, and the bytes that have moved on them."""

    name: str
    open: int
    to_upstream: int
    to_client: int


@dataclass(frozen=True, slots=True)
class View:
    """Everything at one moment."""

    since: float
    """When the relay started counting, in seconds since 1970."""
    workers: int
    draining: int
    """Workers that accept nothing any more."""
    listeners: tuple[ListenerView, ...]
    dns: Mapping[str, Counter]
    accept_pauses: int
    reloads: int
    refused_reloads: int
    clients: tuple[ClientView, ...] = ()
    """Those with most connections, and those with most bytes."""


def view(now: Figures, before: Figures | None, seconds: float) -> View:
    """What to show, for two readings that were `seconds` apart.

    A relay that was restarted in between counts from zero, so there is nothing to compare.
    """
    if before is not None and (before.get("start_time_seconds") != now.get("start_time_seconds") or seconds <= 0):
        before = None
    reading = _Reading(now, before, seconds)
    return View(
        since=min(max(now.get("start_time_seconds"), 0.0), _LATEST),
        workers=int(now.get("workers")),
        draining=int(now.get("workers_draining")),
        listeners=tuple(reading.listener(labels) for labels in now.labels("listener_info")),
        dns={kind: reading.counter("dns_total", kind=kind) for kind in now.by("dns_total", "kind")},
        accept_pauses=int(now.get("accept_pauses_total")),
        reloads=int(now.get("configuration_reloads_total", result="used")),
        refused_reloads=int(now.get("configuration_reloads_total", result="refused")),
        clients=tuple(reading.client(name) for name in now.names("client_connections", "client")[:_MOST_CLIENTS]),
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    now: Figures
    before: Figures | None
    seconds: float

    def counter(self, name: str, **labels: str) -> Counter:
        total = self.now.get(name, **labels)
        rate = None if self.before is None else max(0.0, total - self.before.get(name, **labels)) / self.seconds
        return Counter(int(total), rate)

    def listener(self, info: Mapping[str, str]) -> ListenerView:
        name = info.get("listener", "")
        return ListenerView(
            name=name,
            direction=info.get("direction", ""),
            listen=info.get("listen", ""),
            open=int(self.now.get("connections_active", listener=name)),
            accepted=self.counter("connections_accepted_total", listener=name),
            to_upstream=self.counter("bytes_total", listener=name, to="upstream"),
            to_client=self.counter("bytes_total", listener=name, to="client"),
            brought_back=int(self.now.get("dials_brought_back_total", listener=name)),
            ended=self._reasons("connections_ended_total", name),
            refused=self._reasons("connections_refused_total", name),
        )

    def client(self, name: str) -> ClientView:
        moved = (int(self.now.get("client_bytes", client=name, to=to)) for to in ("upstream", "client"))
        return ClientView(name, int(self.now.get("client_connections", client=name)), *moved)

    def _reasons(self, metric: str, listener: str) -> dict[str, Counter]:
        reasons = self.now.by(metric, "reason", listener=listener)
        return {
            reason: self.counter(metric, listener=listener, reason=reason) for reason, total in reasons.items() if total
        }


def _unescaped(text: str) -> str:
    """A label's value. Whoever answers there, nothing of it moves the cursor of a terminal."""
    plain = _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
    return "".join(char if char.isprintable() else "?" for char in plain)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < _LARGEST:
        raise NotARelayError("what answers there is not a tpctl relay")
    return value
