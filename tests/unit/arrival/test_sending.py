"""How a probe's socket ends, as the kernel tells it."""

from __future__ import annotations

import errno
import select
import selectors
import socket
import struct
from ipaddress import ip_address

from tpctl.arrival.model import Kind, Probe
from tpctl.arrival.sending import Attempt, Sender
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.verdict import Action, Verdict

LOOPBACK = "127.0.0.1"


def test_a_connection_that_was_closed_before_anybody_looked_was_taken() -> None:
    """A data plane that resets what it has accepted is no port at which nobody listens."""
    with socket.create_server((LOOPBACK, 0)) as server:
        attempt = _attempt(server.getsockname()[1])
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        _look(attempt)
    assert attempt.connected is not None
    assert attempt.closed
    assert attempt.error is None


def test_a_port_on_which_nobody_listens_refuses() -> None:
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        attempt = _attempt(held.getsockname()[1])
        _look(attempt)
    assert attempt.connected is None
    assert attempt.error is not None
    assert attempt.error.errno == errno.ECONNREFUSED


def _attempt(port: int) -> Attempt:
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex((LOOPBACK, port))
    here = ip_address(LOOPBACK)
    probe = Probe(
        Kind.OUTBOUND,
        Connection(Direction.OUTBOUND, "tcp", here, here, port, "lo"),
        Verdict(Action.REDIRECT, port, 0, ()),
    )
    return Attempt(probe, client)


def _look(attempt: Attempt) -> None:
    """As the sender does, once there is something to see."""
    sender = Sender.__new__(Sender)
    sender._selector = selectors.DefaultSelector()
    sender._selector.register(attempt.client, selectors.EVENT_WRITE, attempt)
    waiting = select.poll()
    waiting.register(attempt.client, select.POLLERR)
    waiting.poll(10_000)
    sender._client_ready(attempt)
    sender._selector.close()
    attempt.client.close()
