"""The byte pump and the loop, on real sockets that need no network."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.relay.connections.pump import BUFFER_SIZE, Flow, Pipe, PipePool, Wish
from tpctl.relay.loop.loop import Loop


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3 * BUFFER_SIZE), min_size=1, max_size=12), st.integers(0, 3), st.integers(0, 2**32))
def test_a_stream_arrives_whole_whatever_its_pieces(pieces: list[int], pipes: int, seed: int) -> None:
    random_bytes = random.Random(seed)
    data = [random_bytes.randbytes(size) for size in pieces]
    pool = PipePool(pipes)
    writer, source = tcp_pair()
    sink, reader = tcp_pair()
    with writer, source, sink, reader:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        flow = Flow(source, sink, memoryview(bytearray(BUFFER_SIZE)), pool)
        received = bytearray()
        pending = b"".join(data)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if pending:
                with contextlib.suppress(BlockingIOError):
                    pending = pending[writer.send(pending[: random_bytes.randint(1, 2 * BUFFER_SIZE)]) :]
                if not pending:
                    writer.shutdown(socket.SHUT_WR)
            flow.move()
            if random_bytes.random() < 0.7:
                try:
                    chunk = reader.recv(random_bytes.randint(1, 4 * BUFFER_SIZE))
                except BlockingIOError:
                    continue
                if not chunk:
                    break
                received += chunk
        assert flow.wish is Wish.DONE
        assert bytes(received) == b"".join(data)
        assert flow.moved == len(received)
        flow.abandon()
    pool.close()


def test_a_flow_reads_nothing_while_its_sink_is_full() -> None:
    # Not TCP: there the kernel may take some more even a second later.
    writer, source = socket.socketpair()
    sink, reader = socket.socketpair()
    pool = PipePool(0)
    with writer, source, sink, reader:
        for sock in (writer, source, sink):
            sock.setblocking(False)
        flow = Flow(source, sink, memoryview(bytearray(BUFFER_SIZE)), pool)
        while flow.wish is Wish.READ:
            with contextlib.suppress(BlockingIOError):
                writer.send(b"x" * BUFFER_SIZE)
            flow.move()
        moved = flow.moved
        for _ in range(10):
            flow.move()
        assert flow.wish is Wish.WRITE
        assert flow.moved == moved


def test_the_pool_keeps_pipes_and_makes_no_more_than_its_limit() -> None:
    pool = PipePool(2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    pool.give(first)
    assert pool.take() is first
    pool.discard(first)
    third = pool.take()
    assert third is not None
    assert third is not second
    pool.give(second)
    pool.give(third)
    pool.close()


def test_a_pipe_has_the_size_the_kernel_allows() -> None:
    pipe = Pipe()
    assert pipe.size >= 4096
    pipe.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.release()


def test_timers_run_in_order_unless_cancelled(loop: Loop) -> None:
    done: list[str] = []
    loop.later(0.03, lambda: done.append("third"))
    loop.later(0.01, lambda: done.append("first"))
    cancelled = loop.later(0.02, lambda: done.append("second"))
    loop.later(0.04, loop.stop)
    cancelled.cancel()
    loop.run()
    assert done == ["first", "third"]


def test_a_socket_closed_in_a_batch_gets_no_more_events_and_keeps_its_descriptor(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    handled: list[int] = []

    def close_both(mask: int) -> None:
        handled.append(mask)
        for near, _ in pairs:
            loop.close(near)
        assert all(near.fileno() >= 0 for near, _ in pairs)
        loop.stop()

    for near, far in pairs:
        loop.watch(near.fileno(), select.EPOLLIN, close_both)
        far.send(b"x")
    loop.run()
    assert len(handled) == 1
    assert all(near.fileno() == -1 for near, _ in pairs)
    for _, far in pairs:
        far.close()


def test_a_socket_that_was_hung_up_while_another_process_has_it_is_told_of_no_more(loop: Loop) -> None:
    # By its number, which is another socket's by then.
    before, after = socket.socketpair(), socket.socketpair()
    numbers = [before[0].fileno(), after[0].fileno()]
    copies = [before[0].dup(), after[0].dup()]  # as a process that was forked has them
    handled: list[int] = []

    def hang_up() -> None:
        loop.hang_up(before[0])
        loop.share()
        loop.hang_up(after[0])

    def reuse() -> None:
        for number, (_, far) in zip(numbers, (before, after), strict=True):
            loop._handlers[number] = handled.append
            far.close()
        loop.later(0.05, loop.stop)

    for near, _ in (before, after):
        loop.watch(near.fileno(), select.EPOLLIN, handled.append)
    loop.later(0.0, hang_up)
    loop.later(0.01, reuse)
    loop.run()
    assert handled == []
    for copy in copies:
        copy.close()


def test_a_socket_that_was_hung_up_is_closed_and_told_of_no_more(loop: Loop) -> None:
    near, far = socket.socketpair()
    handled: list[int] = []
    loop.watch(near.fileno(), select.EPOLLIN, handled.append)
    loop.later(0.0, lambda: loop.hang_up(near))
    loop.later(0.01, far.close)
    loop.later(0.02, loop.stop)
    loop.run()
    assert near.fileno() == -1
    assert handled == []
