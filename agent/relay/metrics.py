"""The relay's figures in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from agent.relay import tally
from agent.relay.clients import Client
from agent.relay.connection import Ending
from agent.relay.dns_counters import DnsCounters
from agent.relay.listen import show
from agent.relay.route import Refusal
from agent.relay.settings import Settings
from agent.relay.tally import Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DNS_COUNTERS = tuple(field.name for field in fields(DnsCounters))
_PREFIX = "tpctl_relay_"

_BY_LISTENER = (
    ("connections_accepted_total", "counter", "Connections accepted.", tally.ACCEPTED, {}),
    ("connections_active", "gauge", "Connections at this moment.", tally.ACTIVE, {}),
    ("bytes_total", "counter", "Bytes passed on.", tally.SENT, {"to": "upstream"}),
    ("bytes_total", "counter", "Bytes passed on.", tally.RECEIVED, {"to": "client"}),
    ("dials_brought_back_total", "counter", "Connections accepted that were the relay's own dials; they were dialled "
     "again.", tally.BROUGHT_BACK, {}),
    *(
        ("connections_ended_total", "counter", "Connections that ended, by reason.", tally.ENDED[ending],
         {"reason": str(ending)})
        for ending in Ending
    ),
    *(
        ("connections_refused_total", "counter", "Connections refused, by reason.", tally.REFUSED[refusal],
         {"reason": refusal.name.lower()})
        for refusal in Refusal
    ),
)  # fmt: skip


def render(
    counts: Tally, slots: Mapping[str, int], settings: Settings, clients: Mapping[str, Client] | None = None
) -> str:
    """Everything that is counted; `slots` are those of the listeners, `clients` those that were asked for."""
    whole = (*_described(settings), *_listeners(counts, slots), *_whole(counts, settings.workers))
    return "\n".join((*whole, *_clients(clients or {}), ""))


def _described(settings: Settings) -> Iterator[str]:
    yield from _head("listener_info", "gauge", "The listeners: which way their connections go, and where they listen.")
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


def _whole(counts: Tally, workers: int) -> Iterator[str]:
    row = counts.row(tally.WORKER)
    yield from _head("accept_pauses_total", "counter", "How often accepting was paused for want of room.")
    yield _line("accept_pauses_total", {}, row[tally.PAUSES])
    yield from _head("configuration_reloads_total", "counter", "Configurations read again, by result.")
    yield _line("configuration_reloads_total", {"result": "used"}, row[tally.RELOADS])
    yield _line("configuration_reloads_total", {"result": "refused"}, row[tally.FAILED_RELOADS])
    yield from _head("start_time_seconds", "gauge", "When the relay began to count, in seconds since 1970.")
    yield _line("start_time_seconds", {}, int(counts.since))
    yield from _head("accelerated_streams_total", "counter", "Streams left to the kernel, and taken back from it.")
    yield _line("accelerated_streams_total", {"step": "begun"}, row[tally.ACCELERATED])
    yield _line("accelerated_streams_total", {"step": "taken back"}, row[tally.TAKEN_BACK])
    yield from _head("workers", "gauge", "Processes that share the work.")
    yield _line("workers", {}, workers)
    yield from _head("workers_draining", "gauge", "Those of them that accept nothing any more, and end.")
    yield _line("workers_draining", {}, row[tally.DRAINING])
    yield from _head("dns_total", "counter", "What happened to DNS queries, by kind.")
    for number, name in enumerate(DNS_COUNTERS):
        yield _line("dns_total", {"kind": name}, row[tally.DNS + number])


def _clients(clients: Mapping[str, Client]) -> Iterator[str]:
    if clients:
        yield from _head("client_connections", "gauge", "Connections at this moment, of clients that have most.")
        for name, client in clients.items():
            yield _line("client_connections", {"client": name}, client.connections)
        yield from _head("client_bytes", "gauge", "Bytes passed on, on these connections.")
        for name, client in clients.items():
            yield _line("client_bytes", {"client": name, "to": "upstream"}, client.sent)
            yield _line("client_bytes", {"client": name, "to": "client"}, client.received)


def _head(metric: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {_PREFIX}{metric} {text}"
    yield f"# TYPE {_PREFIX}{metric} {kind}"


def _line(metric: str, labels: Mapping[str, str], value: int) -> str:
    inner = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{_PREFIX}{metric}{{{inner}}} {value}" if inner else f"{_PREFIX}{metric} {value}"


def _escaped(text: str) -> str:
    """Only the path of a unix socket can have such characters."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
