"""The thread that writes the log: nobody waits for it, and every line is whole or counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tpctl.system.log_writer import MOST_BYTES, LogWriter

LINE = "x" * 99 + "\n"


class Log:
    """A writer and the other end of its pipe."""

    def __init__(self) -> None:
        self.reader, self.descriptor = os.pipe()
        self.writer = LogWriter(self.descriptor, told)
        self.heard = b""

    def read(self) -> str:
        """Everything that has come, once the writer has written all."""
        os.set_blocking(self.reader, False)
        while not self.writer.finish(0.01):
            self._take()
        self._take()
        heard, self.heard = self.heard, b""
        return heard.decode()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                self.heard += data


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    made.read()  # else its thread would go on to write, to whatever has its descriptor next
    os.close(made.reader)
    os.close(made.descriptor)


def told(lines: int) -> str:
    return f"{lines} dropped\n"


def test_a_reader_that_stalls_gets_what_there_was_room_for_and_the_number_of_the_rest(log: Log) -> None:
    count = 2 * MOST_BYTES // len(LINE)
    for _ in range(count):
        log.writer.write(LINE)
    dropped = log.writer.dropped
    assert count // 3 < dropped < count
    lines = log.read().splitlines(keepends=True)
    assert lines.count(LINE) == count - dropped
    assert set(lines) == {LINE, told(dropped)}
    log.writer.write(LINE)
    assert log.read() == LINE


def test_a_forked_process_writes_its_own_lines_and_not_its_parents(log: Log) -> None:
    for _ in range(MOST_BYTES // len(LINE) + 1000):
        log.writer.write(LINE)
    assert log.writer.dropped
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.descriptor)
        log.writer.write("of the child\n")
        os._exit(log.writer.dropped or not log.writer.finish(30))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_nothing_is_lost_that_was_written_before_the_end(log: Log) -> None:
    for number in range(50):
        log.writer.write(f"{number}\n")
        assert log.writer.finish(30)
        assert os.read(log.reader, 100) == b"%d\n" % number


def test_the_end_is_not_waited_for_when_nobody_reads(log: Log) -> None:
    for _ in range(1000):
        log.writer.write(LINE)
    assert not log.writer.finish(0.1)


def test_text_that_is_no_text_is_written(log: Log) -> None:
    """The name of a file may be any bytes."""
    log.writer.write("\udcff\n")
    assert log.read() == "\\udcff\n"
