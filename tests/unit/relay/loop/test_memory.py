"""When the relay gives memory back: after many connections, and never while it is busy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from tpctl.relay.loop import memory
from tpctl.relay.loop.loop import Loop, Timer, shrink
from tpctl.relay.loop.memory import Memory


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_made_here() -> Iterator[None]:
    """The garbage collector is called over and over, and this process holds all that was tested before."""
    gc.freeze()
    yield
    gc.unfreeze()


class Clock(Loop):
    """A loop whose time passes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[float, Timer]] = []

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        self.waiting.append((seconds, Timer(action)))
        return self.waiting[-1][1]

    def next(self) -> float:
        """Do what is due first; the seconds after which it was to be done."""
        self.waiting.sort(key=lambda one: one[0])
        seconds, timer = self.waiting.pop(0)
        if timer.action is not None:
            timer.action()
        return seconds


class Worker:
    """As many connections as a test says."""

    def __init__(self) -> None:
        self.busy = 0
        self.returns = 0
        self.clock = Clock()
        self.memory = Memory(self.clock, lambda: self.busy, self.let_go)

    def let_go(self) -> None:
        self.returns += 1

    def end(self, connections: int) -> None:
        for _ in range(connections):
            self.busy -= 1
            self.memory.ended()


def test_memory_is_given_back_when_many_have_gone_and_again_when_their_deadlines_have() -> None:
    worker = Worker()
    worker.busy = 1000
    worker.end(1000)
    worker.clock.next()
    assert worker.returns == 0, "a thousand have just ended, so there may be as many new ones"
    worker.clock.next()
    assert worker.returns == 1
    assert worker.clock.next() > 10
    worker.clock.next()
    assert worker.returns == 2
    while worker.clock.waiting:
        worker.clock.next()
    assert worker.returns == 6, "and then nobody is woken any more"


def test_nothing_is_given_back_while_as_many_come_as_go() -> None:
    worker = Worker()
    worker.busy = 1000
    for _ in range(10):
        worker.end(500)
        worker.busy += 500
        worker.clock.next()
    assert worker.returns == 0


def test_nothing_is_given_back_after_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 1 << 20)  # whatever other threads of the tests do
    worker = Worker()
    for _ in range(10):
        worker.busy = 20
        worker.end(20)
        worker.clock.next()
        assert not worker.clock.waiting
    assert worker.returns == 0


def test_connections_that_stay_do_not_keep_what_the_others_have_left() -> None:
    worker = Worker()
    worker.busy = 1000
    worker.end(900)
    worker.clock.next()
    worker.clock.next()
    assert worker.returns == 1
    while worker.clock.waiting:
        worker.clock.next()
    before = worker.returns
    worker.end(99)
    worker.clock.next()
    assert worker.returns == before + 1, "what lay around them could not be given back before"


def test_what_grew_without_many_connections_is_given_back() -> None:
    worker = Worker()
    ballast = bytes([1]) * (64 << 20)
    worker.busy = 1
    worker.end(1)
    worker.clock.next()
    assert worker.returns == 1
    assert ballast


def test_a_dictionary_gives_its_room_back_and_stays_the_same() -> None:
    table = dict.fromkeys(range(100_000))
    for number in range(99_990):
        del table[number]
    before = table.__sizeof__()
    shrink(table)
    assert table == dict.fromkeys(range(99_990, 100_000))
    assert table.__sizeof__() < before / 100
