"""What a supervisor knows of its workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpctl.relay.process import channel
from tpctl.relay.process.crew import Member, Reloads


@pytest.fixture
def workers() -> Iterator[dict[int, Member]]:
    """Two, by their pids."""
    ends = [channel.pair() for _ in range(2)]
    yield {10 + number: Member(number, mine, 0.0, 0) for number, (mine, _theirs) in enumerate(ends)}
    for pair in ends:
        for end in pair:
            end.close()


def test_a_reload_is_over_when_every_worker_has_it(workers: dict[int, Member]) -> None:
    reloads, done = Reloads(), list[str]()
    for name in ("first", "second"):
        for worker in workers.values():
            worker.sent += 1
        reloads.begin(workers, lambda name=name: done.append(name))  # type: ignore[misc]
    workers[10].taken = 2
    reloads.look(workers)
    assert done == []
    workers[11].taken = 1
    reloads.look(workers)
    assert done == ["first"]
    workers[11].taken = 2
    reloads.look(workers)
    assert done == ["first", "second"]


def test_nobody_waits_for_a_worker_that_has_gone(workers: dict[int, Member]) -> None:
    reloads, done = Reloads(), list[str]()
    workers[11].sent += 1
    reloads.begin(workers, lambda: done.append("first"))
    assert done == []
    del workers[11]
    reloads.look(workers)
    assert done == ["first"]
    reloads.begin({}, lambda: done.append("second"))
    assert done == ["first", "second"]


def test_an_answer_is_told_from_an_end() -> None:
    mine, theirs = channel.pair()
    with pytest.raises(BlockingIOError):
        channel.is_answer(mine)
    channel.answer(theirs)
    theirs.close()
    assert channel.is_answer(mine)
    assert not channel.is_answer(mine)
    channel.answer(mine)  # nobody hears it, which is no error
    mine.close()
