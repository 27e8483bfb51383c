"""What becomes of exceptions that nobody expected."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from select import EPOLLIN

import pytest

from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.loop import Loop


class Subject:
    """Fails whatever it is asked, and remembers how it was ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[object, ...]] = []

    def fail(self, *_arguments: object) -> None:
        raise KeyError("unforeseen")

    def break_off(self, error: Exception, *arguments: object) -> None:
        self.ended.append((type(error), *arguments))


class Stubborn(Subject):
    """Cannot even be ended."""

    def break_off(self, error: Exception, *arguments: object) -> None:
        super().break_off(error, *arguments)
        raise ValueError("again")


def reporting() -> tuple[Loop, list[str]]:
    reports: list[str] = []

    def report(error: Exception, action: Callable[..., object]) -> None:
        reports.append(f"{action.__qualname__}: {error!r}")

    return Loop(report), reports


def test_a_handler_ends_its_own_and_the_loop_goes_on() -> None:
    loop, reports = reporting()
    subject, stubborn = Subject(), Stubborn()
    pairs = [socket.socketpair() for _ in range(2)]
    for (reader, writer), one in zip(pairs, (subject, stubborn), strict=True):
        loop.watch(reader.fileno(), EPOLLIN, partial(one.fail, "bound"))
        writer.send(b"x")
    loop.later(0, stubborn.fail)
    loop.later(0.05, loop.stop)
    loop.run()
    loop.release()
    for pair in pairs:
        for sock in pair:
            sock.close()
    assert subject.ended[0] == (KeyError, "bound", EPOLLIN)[:2]
    assert (KeyError, "bound") in stubborn.ended
    assert (KeyError,) in stubborn.ended, "of the timer"
    assert "Subject.fail: KeyError('unforeseen')" in reports
    assert "Stubborn.break_off: ValueError('again')" in reports


def test_what_is_done_again_and_again_is_done_again_after_a_failure() -> None:
    loop, reports = reporting()
    loop.every(0.001, Subject().fail)
    loop.later(0.1, loop.stop)
    loop.run()
    loop.release()
    assert len(reports) > 2


def test_a_deadline_that_fails_does_not_hold_up_the_others() -> None:
    loop, reports = reporting()
    subjects = [Subject() for _ in range(3)]
    deadlines = Deadlines[Subject](loop, 0.01, Subject.fail)
    for one in subjects:
        deadlines.add(one)
    loop.later(0.2, loop.stop)
    loop.run()
    loop.release()
    assert [one.ended for one in subjects] == [[(KeyError,)]] * 3
    assert len(reports) == 3


def test_without_anybody_to_tell_it_is_raised() -> None:
    loop = Loop()
    loop.later(0, Subject().fail)
    with pytest.raises(KeyError):
        loop.run()
    loop.release()
