"""The server of the relay's metrics when its process goes: whoever has come is answered."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
import structlog

from tpctl.relay.figures.metrics_server import MetricsServer
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.release()


def turn(loop: Loop, until: Callable[[], object] = lambda: True) -> None:
    """Let the loop do what there is to do, and until something has come true."""
    end = time.monotonic() + 60
    while True:
        loop.later(0.05, loop.stop)
        loop.run()
        if until():
            return
        assert time.monotonic() < end


def test_who_has_come_before_a_drain_is_answered(loop: Loop) -> None:
    server = MetricsServer(loop, Complaints(structlog.get_logger()), lambda _with_clients: "figures 1\n", {})
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    server.listen(listener)
    gone: list[str] = []
    with socket.create_connection(address, timeout=60) as asking:
        asking.sendall(b"GET /metrics HTTP/1.1\r\n")
        turn(loop, lambda: server._clients)
        assert server.busy == 0, "while nobody waits for it to end"
        server.drain(lambda: gone.append("idle"))
        turn(loop)
        assert (server.busy, gone) == (1, [])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=10)
        asking.sendall(b"\r\n")
        turn(loop, lambda: not server.busy)
        assert asking.recv(1000).endswith(b"\r\n\r\nfigures 1\n")
    assert gone == ["idle"]
