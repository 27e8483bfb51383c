"""What workers know of each other's dials."""

from __future__ import annotations

import pytest

from tpctl.relay.connections.hops import Hops, Link
from tpctl.relay.loop.original_destination import Destination

SERVER, HERE = Destination("192.0.2.1", 443), Destination("192.0.2.2", 15006)


def test_hops_through_other_workers_are_counted() -> None:
    hops = Hops(2)
    hops.be(1)
    link = Link("198.51.100.9", 40000, SERVER)
    hops.begin(SERVER)
    assert hops.of(link) == 0, "it has no port yet"
    hops.note(link, 2)
    hops.made()
    assert hops.of(link) == 3
    for other in (link._replace(port=40001), link._replace(host="198.51.100.8"), link._replace(destination=HERE)):
        assert hops.of(other) == 0
        hops.forget(other)
    assert hops.of(link) == 3, "the end of another one is none of its own"
    hops.forget(link)
    assert hops.of(link) == 0


def test_a_worker_that_was_interrupted_before_it_has_noted_its_dial_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hops = Hops(2)
    hops.be(1)
    link = Link("198.51.100.9", 40000, SERVER)
    hops.begin(SERVER)

    def go_on(_seconds: float) -> None:
        hops.note(link, 2)
        hops.made()

    monkeypatch.setattr("time.sleep", go_on)
    assert hops.of(link) == 3


def test_nobody_waits_for_dials_that_were_begun_later(monkeypatch: pytest.MonkeyPatch) -> None:
    hops = Hops(2)
    hops.be(1)
    hops.begin(SERVER)
    looks = []

    def dial_on() -> None:
        looks.append(1)
        hops.made()
        hops.begin(SERVER)

    monkeypatch.setattr("os.sched_yield", dial_on)
    assert hops.of(Link("198.51.100.9", 40000, SERVER)) == 0
    assert len(looks) == 1
