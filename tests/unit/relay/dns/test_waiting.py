"""Who has to go when too many wait for an answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tpctl.relay.dns.waiting import KEPT, MAX_PENDING, OF_OTHERS, OWN, Waiting, WaitingRoom


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        yield made


def waiting(listener: socket.socket, host: str, number: int, kind: int = OF_OTHERS) -> Waiting:
    return Waiting(listener, (host, number), (), number, kind)


def test_the_address_that_has_most_makes_room(listener: socket.socket) -> None:
    room = WaitingRoom[int]()
    for number in range(MAX_PENDING):
        if not room.enter(waiting(listener, "10.0.0.1", number), number):
            break
    assert len(room) == MAX_PENDING - KEPT[OWN]
    newcomer = waiting(listener, "10.0.0.2", 1)
    assert not room.enter(newcomer, 1)
    found = room.in_the_way(newcomer)
    assert found == (waiting(listener, "10.0.0.1", 0), 0)
    room.leave(*found)
    assert room.enter(newcomer, 1)
    assert room.in_the_way(waiting(listener, "10.0.0.1", 5000)) is None, "it has most itself"


def test_it_ends_when_all_have_the_same(listener: socket.socket) -> None:
    room = WaitingRoom[int]()
    sent_away = entered = 0
    for number in range(3 * MAX_PENDING):
        one = waiting(listener, f"10.0.{number % 3}.1", number)
        while not room.enter(one, number):
            found = room.in_the_way(one)
            if found is None:
                break
            room.leave(*found)
            sent_away += 1
        else:
            entered += 1
    assert entered - sent_away == len(room) == MAX_PENDING - KEPT[OWN]


def test_places_that_are_kept_stay_free(listener: socket.socket) -> None:
    room = WaitingRoom[int]()
    for kind, host in ((OF_OTHERS, "10.0.0.1"), (OWN, "127.0.0.1")):
        for number in range(MAX_PENDING):
            room.enter(waiting(listener, host, number, kind), number)
    assert len(room) == MAX_PENDING
    assert room.in_the_way(waiting(listener, "127.0.0.1", 5000, OWN)) is None, "others have nothing to do with it"


def test_several_queries_under_one_id_and_port(listener: socket.socket) -> None:
    room = WaitingRoom[int]()
    one = waiting(listener, "10.0.0.1", 7)
    for query in range(3):
        assert room.enter(one, query)
    assert room.in_the_way(waiting(listener, "10.0.0.2", 1)) == (one, 0)
    for query in range(3):
        assert len(room) == 3 - query
        room.leave(one, query)
    assert len(room) == 0
