"""The relay's figures in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats). Pure."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from tpctl import __version__
from tpctl.relay.connections import tally
from tpctl.relay.connections.clients import Client
from tpctl.relay.connections.route import Refusal
from tpctl.relay.connections.states import Ending
from tpctl.relay.connections.tally import Histogram, Tally
from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import Settings
from tpctl.system import exposition

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DNS_COUNTERS = tuple(field.name for field in fields(DnsCounters))
_PREFIX = "tpctl_relay_"

_BY_LISTENER = (
    ("connections_accepted_total", "counter", "Connections accepted.", tally.ACCEPTED, {}),
    ("connections_active", "gauge", "Open connections.", tally.ACTIVE, {}),
    ("bytes_total", "counter", "Bytes passed on.", tally.SENT, {"to": "upstream"}),
    ("bytes_total", "counter", "Bytes passed on.", tally.RECEIVED, {"to": "client"}),
    ("dials_brought_back_total", "counter", "Connections accepted that were the relay's own dials; they were dialled "
     "again.", tally.BROUGHT_BACK, {}),
    *(
        ("connections_ended_total", "counter", "Connections that ended, by reason.", tally.ENDED[ending],
         {"reason": ending.name.lower()})
        for ending in Ending
    ),
    *(
        ("connections_refused_total", "counter", "Connections refused, by reason.", tally.REFUSED[refusal],
         {"reason": refusal.name.lower()})
        for refusal in Refusal
    ),
)  # fmt: skip

_HISTOGRAMS = (
    ("connect_seconds", "How long it took to reach an upstream, from the first dial.", tally.CONNECT),
    ("connection_seconds", "How long connections lasted, from the client's arrival to the end.", tally.LENGTH),
)


def render(
    counts: Tally, slots: Mapping[str, int], settings: Settings, clients: Mapping[str, Client] | None = None
) -> str:
    """Everything that is counted; `slots` are those of the listeners, `clients` those that were asked for."""
    whole = (*_described(settings), *_listeners(counts, slots), *_whole(counts, settings.workers))
    return "\n".join((*whole, *_clients(clients or {}), ""))


def _described(settings: Settings) -> Iterator[str]:
    yield from _head("build_info", "gauge", "The version that runs.")
    yield _line("build_info", {"version": __version__, "python": platform.python_version()}, 1)
    yield from _head("listener_info", "gauge", "The listeners: their direction, and where they listen.")
    for one in settings.listeners:
        labels = {"listener": one.name, "direction": str(one.role), "listen": show(one.listen.address)}
        yield _line("listener_info", labels, 1)


def _listeners(counts: Tally, slots: Mapping[str, int]) -> Iterator[str]:
    rows = {name: counts.row(slot) for name, slot in slots.items()}
    described = ""
    for metric, kind, text, counter, labels in _BY_LISTENER:
        if metric != described:
            yield from _head(metric, kind, text)
            described = metric
        for name, row in rows.items():
            yield _line(metric, {"listener": name, **labels}, row[counter])
    for metric, text, histogram in _HISTOGRAMS:
        yield from _head(metric, "histogram", text)
        for name, row in rows.items():
            yield from _buckets(metric, name, row, histogram)


def _buckets(metric: str, listener: str, row: Sequence[int], histogram: Histogram) -> Iterator[str]:
    count = 0
    for number, bound in enumerate((*histogram.bounds, None)):
        count += row[histogram.first + number]
        until = "+Inf" if bound is None else f"{bound:g}"
        yield _line(f"{metric}_bucket", {"listener": listener, "le": until}, count)
    yield _line(f"{metric}_sum", {"listener": listener}, f"{row[histogram.sum] / 1e6:.6f}")
    yield _line(f"{metric}_count", {"listener": listener}, count)


def _whole(counts: Tally, workers: int) -> Iterator[str]:
    row = counts.row(tally.WORKER)
    yield from _head("accept_pauses_total", "counter", "How often accepting was paused for lack of resources.")
    yield _line("accept_pauses_total", {}, row[tally.PAUSES])
    yield from _head("configuration_reloads_total", "counter", "Configuration reloads, by result.")
    yield _line("configuration_reloads_total", {"result": "used"}, row[tally.RELOADS])
    yield _line("configuration_reloads_total", {"result": "refused"}, row[tally.FAILED_RELOADS])
    yield from _head("handler_failures_total", "counter", "Internal errors that were contained.")
    yield _line("handler_failures_total", {}, row[tally.FAILURES])
    yield from _head("log_lines_dropped_total", "counter", "Log lines that could not be written, or not in time.")
    yield _line("log_lines_dropped_total", {}, row[tally.DROPPED_LINES])
    yield from _head("start_time_seconds", "gauge", "When the relay started counting, in seconds since 1970.")
    yield _line("start_time_seconds", {}, int(counts.since))
    yield from _head("accelerated_streams_total", "counter", "Streams handed to the kernel, and taken back from it.")
    yield _line("accelerated_streams_total", {"step": "begun"}, row[tally.ACCELERATED])
    yield _line("accelerated_streams_total", {"step": "taken_back"}, row[tally.TAKEN_BACK])
    yield from _head("workers", "gauge", "Processes that share the work.")
    yield _line("workers", {}, workers)
    yield from _head("workers_draining", "gauge", "Workers that no longer accept connections and are ending.")
    yield _line("workers_draining", {}, row[tally.DRAINING])
    yield from _head("dns_total", "counter", "What happened to DNS queries, by kind.")
    for number, name in enumerate(DNS_COUNTERS):
        yield _line("dns_total", {"kind": name}, row[tally.DNS + number])


def _clients(clients: Mapping[str, Client]) -> Iterator[str]:
    if clients:
        yield from _head("client_connections", "gauge", "Open connections of the clients with the most.")
        for name, client in clients.items():
            yield _line("client_connections", {"client": name}, client.connections)
        yield from _head("client_bytes", "gauge", "Bytes passed on, on these connections.")
        for name, client in clients.items():
            yield _line("client_bytes", {"client": name, "to": "upstream"}, client.sent)
            yield _line("client_bytes", {"client": name, "to": "client"}, client.received)


def _head(metric: str, kind: str, text: str) -> Iterator[str]:
    return exposition.head(f"{_PREFIX}{metric}", kind, text)


def _line(metric: str, labels: Mapping[str, str], value: int | str) -> str:
    return exposition.line(f"{_PREFIX}{metric}", labels, value)
