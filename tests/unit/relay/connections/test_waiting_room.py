"""Guests that wait for what another worker knows."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from functools import partial
from select import EPOLLIN

import pytest

from tpctl.relay.connections.waiting_room import PATIENCE_SECONDS, WaitingRoom
from tpctl.relay.loop.loop import Loop

LONG = 60.0
"""Seconds: longer than any pause of a busy machine."""


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.release()


def test_the_loop_serves_others_until_it_is_known(loop: Loop) -> None:
    near, far = socket.socketpair()
    is_known = False
    order: list[str] = []

    def on_event(_mask: int) -> None:
        nonlocal is_known
        near.recv(1)
        order.append("another one")
        is_known = True

    def go_on(guest: str) -> None:
        order.append(guest)
        loop.stop()

    room = WaitingRoom[str](loop, go_on, LONG)
    with near, far:
        loop.watch(near.fileno(), EPOLLIN, on_event)
        room.enter("guest", lambda: not is_known)
        loop.later(0.005, partial(far.sendall, b"x"))
        loop.run()
    assert order == ["another one", "guest"]
    assert len(room) == 0


def test_nobody_waits_for_ever(loop: Loop) -> None:
    room = WaitingRoom[str](loop, lambda _guest: loop.stop())
    began = time.monotonic()
    room.enter("guest", lambda: True)
    loop.run()
    assert time.monotonic() - began >= PATIENCE_SECONDS


def test_each_goes_on_by_itself_and_who_has_left_does_not(loop: Loop) -> None:
    served: list[str] = []

    def go_on(guest: str) -> None:
        served.append(guest)
        if guest in ("late", "next"):
            loop.stop()

    room = WaitingRoom[str](loop, go_on, LONG)
    room.enter("late", lambda: "early" not in served)
    room.enter("early", lambda: False)
    room.enter("gone", lambda: True)
    assert len(room) == 3
    room.leave("gone")
    loop.run()
    assert served == ["early", "late"]
    room.enter("next", lambda: False)
    loop.run()
    assert served == ["early", "late", "next"]
