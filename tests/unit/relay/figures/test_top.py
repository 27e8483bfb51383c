"""What `tpctl top` makes of two readings, and how it shows it."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpctl
from tpctl.relay.connections import tally
from tpctl.relay.connections.clients import MOST, Client
from tpctl.relay.connections.route import Refusal
from tpctl.relay.connections.states import Ending
from tpctl.relay.connections.tally import (
    ACCEPTED,
    ACTIVE,
    BROUGHT_BACK,
    DNS,
    ENDED,
    PAUSES,
    RECEIVED,
    REFUSED,
    SENT,
    WORKER,
    Tally,
)
from tpctl.relay.figures import metrics
from tpctl.relay.figures import view as top_view
from tpctl.relay.figures.metrics import render
from tpctl.relay.figures.metrics_server import answer
from tpctl.relay.figures.reckoning import ClientView, Counter, Figures, NotARelayError, View, view
from tpctl.relay.settings.listen import read_listen
from tpctl.relay.settings.model import ListenerSettings, Role, Settings

SETTINGS = Settings(
    listeners=(
        ListenerSettings("in", Role.INBOUND, read_listen("[::]:15006")),
        ListenerSettings("out", Role.OUTBOUND, read_listen('unix:/run/a"b\\c')),
        ListenerSettings("dns", Role.DNS, read_listen("*:15053")),
    ),
    workers=2,
)
SLOTS = {"in": 0, "out": 1, "dns": 2}


@pytest.fixture
def counts() -> Tally:
    return Tally(2)


def figures(counts: Tally) -> Figures:
    return Figures(render(counts, SLOTS, SETTINGS))


def later(counts: Tally) -> View:
    """A view over two seconds in which something has happened."""
    counts.put(0, ACCEPTED, 1000)
    counts.put(0, SENT, 50)
    before = figures(counts)
    for worker in range(2):
        counts.be(worker)
        counts.add(0, ACCEPTED, 10)
        counts.add(0, ACTIVE, 3)
        counts.add(0, SENT, 2500)
        counts.add(0, RECEIVED, 1_500_000)
        counts.add(0, ENDED[Ending.CLOSED], 4)
        counts.add(0, ENDED[Ending.IDLE], 2)
        counts.add(0, REFUSED[Refusal.SOURCE], 1)
        counts.add(1, BROUGHT_BACK, 1)
        counts.add(WORKER, PAUSES, 2)
        counts.add(WORKER, DNS, 5)
    return view(figures(counts), before, 2.0)


def test_totals_and_rates(counts: Tally) -> None:
    shown = later(counts)
    inbound, outbound, _dns = shown.listeners
    assert (inbound.open, inbound.accepted.total, inbound.accepted.rate) == (6, 1020, 10.0)
    assert (inbound.to_upstream.total, inbound.to_upstream.rate, inbound.to_client.rate) == (5050, 2500.0, 1_500_000.0)
    assert {reason: (one.total, one.rate) for reason, one in inbound.ended.items()} == {
        "closed": (8, 4.0),
        "idle": (4, 2.0),
    }
    assert (inbound.refused["source"].total, inbound.errors.total, inbound.errors.rate) == (2, 6, 3.0)
    assert (outbound.listen, outbound.brought_back) == ('unix:/run/a"b\\c', 2)
    assert outbound.errors == Counter(0, 0.0)
    assert (shown.dns[metrics.DNS_COUNTERS[0]].total, shown.dns[metrics.DNS_COUNTERS[0]].rate) == (10, 5.0)
    assert (shown.workers, shown.accept_pauses, shown.draining) == (2, 4, 0)


def test_nothing_is_compared_with_another_relay(counts: Tally) -> None:
    counts.put(0, ACCEPTED, 7)
    before = figures(counts)
    restarted = Tally(2)
    restarted.since = counts.since + 100
    shown = view(figures(restarted), before, 2.0)
    assert shown.listeners[0].accepted == Counter(0, None)
    assert shown.listeners[0].errors.rate is None
    assert view(before, None, 2.0).listeners[0].accepted == Counter(7, None)


def test_clients_of_all_workers(counts: Tally) -> None:
    for worker, found in enumerate(
        ({"10.0.0.1": Client(2, 5, 0), "unix:": Client(1, 0, 9)}, {"10.0.0.1": Client(3, 1, 1)})
    ):
        counts.be(worker)
        counts.clients.tell(found)
    assert counts.clients.told() == {"10.0.0.1": Client(5, 6, 1), "unix:": Client(1, 0, 9)}
    text = render(counts, SLOTS, SETTINGS, counts.clients.told())
    shown = view(Figures(text), None, 1.0)
    assert shown.clients == (ClientView("10.0.0.1", 5, 6, 1), ClientView("unix:", 1, 0, 9))
    assert ["10.0.0.1", "5", "6", "B", "1", "B"] in [line.split() for line in top_view.lines(shown, "here", 0.0)]
    assert "tpctl_relay_client_" not in render(counts, SLOTS, SETTINGS)


def test_the_busiest_clients_fit_in_however_many_there_are(counts: Tally) -> None:
    longest = "fe80:1111:2222:3333:4444:5555:6666:{:04x}%interface123456"
    found = {longest.format(number): Client(number, 2**64 - number, 2**64 - 1) for number in range(1000)}
    counts.clients.tell(found)
    told = counts.clients.told()
    assert len(told) == 2 * MOST
    assert next(iter(told)) == longest.format(999)
    assert longest.format(0) in told, "it has most bytes"


def test_what_a_worker_told_long_ago_or_is_just_writing_does_not_count(
    counts: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not counts.clients.are_asked_for()
    counts.clients.ask()
    counts.clients.tell({"10.0.0.1": Client(1, 0, 0)})
    assert counts.clients.are_asked_for()
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now + 30)
        assert counts.clients.told() == {}
        assert not counts.clients.are_asked_for()
    counts.clients._rows[20] ^= 1
    assert counts.clients.told() == {}


def test_clients_are_told_only_to_who_asks() -> None:
    asked: list[bool] = []

    def text(with_clients: bool) -> str:
        asked.append(with_clients)
        return "figures"

    for path in ("/metrics", "/metrics?clients", "/", "/metrics?x=?clients&y"):
        assert answer(f"GET {path} HTTP/1.1\r\n\r\n".encode(), text, {}).endswith(b"\r\n\r\nfigures")
    assert asked == [False, True, False, False]


@pytest.mark.parametrize("trouble", [None, "draining: no connection is accepted any more"])
def test_probes_of_orchestrators(trouble: str | None) -> None:
    probes = {b"/healthz": lambda: None, b"/ready": lambda: trouble}

    def asked(path: str, method: str = "GET") -> list[bytes]:
        said = answer(f"{method} {path} HTTP/1.1\r\n\r\n".encode(), lambda _: pytest.fail("rendered"), probes)
        head, _, body = said.partition(b"\r\n\r\n")
        return [head.split(b" ")[1], body]

    assert asked("/healthz") == [b"200", b"ok\n"]
    assert asked("/ready?x") == ([b"503", f"{trouble}\n".encode()] if trouble else [b"200", b"ok\n"])
    assert asked("/ready", "HEAD")[1] == b""
    assert asked("/healthz", "POST")[0] == b"405"
    assert asked("/health")[0] == b"404"


def test_labels_are_words_of_a_fixed_set(counts: Tally) -> None:
    text = render(counts, SLOTS, SETTINGS)
    values = re.findall(r'(?:reason|kind|step|result|to)="([^"]*)"', text)
    assert len(values) > 50
    assert [value for value in values if not re.fullmatch(r"[a-z]+(_[a-z]+)*", value)] == []


def test_how_long_something_took(counts: Tally) -> None:
    """As Prometheus reads it: cumulative, and what takes exactly as long as a bound is within it."""
    for seconds in (0.0, 0.0005, 0.0006, 0.3, 11.0):
        counts.observe(0, tally.CONNECT, seconds)
    counts.be(1)
    counts.observe(0, tally.CONNECT, 0.5)
    found = figures(counts)
    buckets = found.by("connect_seconds_bucket", "le", listener="in")
    assert [buckets[until] for until in ("0.0005", "0.001", "0.25", "0.5", "10", "+Inf")] == [2, 3, 3, 5, 5, 6]
    assert found.get("connect_seconds_count", listener="in") == 6
    assert found.get("connect_seconds_sum", listener="in") == pytest.approx(11.8011)
    assert found.get("connect_seconds_count", listener="out") == 0
    assert found.get("build_info", version=tpctl.__version__, python=platform.python_version()) == 1


def test_the_picture(counts: Tally) -> None:
    shown = top_view.lines(later(counts), "127.0.0.1:9902", counts.since + 7300)
    assert shown[0].startswith("relay at 127.0.0.1:9902: serving, 2 workers, since ")
    assert shown[0].endswith(" (2 h)")
    rows = [" ".join(line.split()) for line in shown]
    assert "in inbound [::]:15006 6 10.0 2.5 kB 1.5 MB 3.0" in rows
    assert 'out outbound unix:/run/a"b\\c 0 0.0 0 B 0 B 0.0' in rows
    assert "in idle for too long 4 2.0" in rows
    assert "in refused: source 2 1.0" in rows
    assert "out dials brought back to the relay, and dialled again 2" in rows
    assert "accepting paused 4 times" in rows
    assert not any("closed" in row for row in rows)
    assert top_view.fit(shown, 10, 3) == [line[:10].rstrip() for line in shown[:3]]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (1234, "1.2 kB"), (123_456, "123 kB"), (99.95e9, "100.0 GB"),
     (5e15, "5000 TB")],
)  # fmt: skip
def test_sizes(number: float, text: str) -> None:
    assert top_view.size(number) == text


@given(st.text() | st.text(alphabet='tpcl_reay{}="\\, 0123456789\n#'))
def test_any_text_is_a_relays_or_not(text: str) -> None:
    with contextlib.suppress(NotARelayError):
        view(Figures(text), None, 1.0)
    assert view(Figures(f"tpctl_relay_workers 1\n{metrics.CONTENT_TYPE}"), None, 1.0).workers == 1


def test_what_is_no_number() -> None:
    for text in (
        "tpctl_relay_workers x",
        "tpctl_relay_workers nan",
        "tpctl_relay_workers -inf",
        "tpctl_relay_workers{} ",
        "",
        "node_cpu 1",
    ):
        with pytest.raises(NotARelayError):
            Figures(text)


def test_what_is_shown_moves_no_cursor() -> None:
    text = "tpctl_relay_workers 1\ntpctl_relay_start_time_seconds 1e19\n"
    text += 'tpctl_relay_listener_info{listener="a\x1b[2J\\nb",direction="inbound",listen="x"} 1'
    shown = view(Figures(text), None, 1.0)
    assert shown.listeners[0].name == "a?[2J?b"
    assert not any("\x1b" in line for line in top_view.lines(shown, "here", 0.0))
    assert top_view.document(shown, "here")["since"] == "9999-12-31T23:59:59Z"


def calls(work: Callable[[], object]) -> int:
    """How many functions are called for it: what a busy machine does not change."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_twice_the_listeners_take_twice_the_work() -> None:
    def figures(listeners: int) -> Figures:
        lines = ["tpctl_relay_workers 1"]
        for number in range(listeners):
            name = f'listener="l{number}"'
            lines.append(f"tpctl_relay_listener_info{{{name}}} 1")
            lines += [
                f'tpctl_relay_connections_{what}_total{{{name},reason="{reason}"}} 1'
                for what in ("ended", "refused")
                for reason in ("a", "b")
            ]
        return Figures("\n".join(lines))

    few, many = figures(50), figures(100)
    assert calls(lambda: view(many, many, 1.0)) < 2.2 * calls(lambda: view(few, few, 1.0))
