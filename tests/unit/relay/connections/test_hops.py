"""What workers know of each other's dials."""

from __future__ import annotations

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


def test_a_dial_without_a_port_is_under_way_until_it_has_one() -> None:
    hops = Hops(2)
    hops.be(1)
    link = Link("198.51.100.9", 40000, SERVER)
    assert not hops.under_way(link)
    hops.begin(SERVER)
    assert not hops.under_way(link._replace(destination=HERE)), "it goes elsewhere"
    dials = hops.under_way(link)
    assert hops.are_under_way(dials, link)
    hops.note(link, 2)
    assert not hops.under_way(link), "it is known before it has been made"
    assert not hops.are_under_way(dials, link)
    assert hops.of(link) == 3
    assert hops.are_under_way(dials, link._replace(port=40001)), "another one may still be meant"
    hops.made()
    assert not hops.are_under_way(dials, link._replace(port=40001))


def test_nobody_waits_for_dials_that_were_begun_later() -> None:
    hops = Hops(2)
    hops.be(1)
    link = Link("198.51.100.9", 40000, SERVER)
    hops.begin(SERVER)
    dials = hops.under_way(link)
    hops.made()
    hops.begin(SERVER)
    assert not hops.are_under_way(dials, link)


def test_nobody_waits_for_a_worker_that_has_died() -> None:
    hops = Hops(2)
    hops.be(1)
    link = Link("198.51.100.9", 40000, SERVER)
    hops.begin(SERVER)
    dials = hops.under_way(link)
    hops.bury(1)
    assert not hops.are_under_way(dials, link)
