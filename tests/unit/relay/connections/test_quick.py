"""Connections that are edge-triggered, and how they change back: over real TCP connections."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.relay.connections.connection import Connection
from tpctl.relay.connections.dialling import Dialling, Exchange
from tpctl.relay.connections.dials import Dial
from tpctl.relay.connections.held_ports import HeldPorts
from tpctl.relay.connections.hops import Hops
from tpctl.relay.connections.plan import Context, Plan
from tpctl.relay.connections.pump import BUFFER_SIZE, PipePool
from tpctl.relay.connections.quick import QuickConnection
from tpctl.relay.connections.states import Ending
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination

PATIENCE = 30.0
URGENT = b"!"
"""Sent as urgent data, and as nothing else: the relay passes it on only if a later urgent byte has taken its place."""
KINDS = [QuickConnection, Connection]


class Side:
    """A client or a server: what it says, and what it has heard."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.said = bytearray()
        self.heard = bytearray()
        self.has_ended = False
        """Whether it will say no more."""
        self.is_deaf = False
        self.heard_end = False
        self._unsent = bytearray()

    def say(self, size: int) -> None:
        """So many bytes, of which no two pieces are alike."""
        at = len(self.said)
        self.said += bytes(ord("a") + (at + number) // 251 % 26 for number in range(size))
        self._unsent += self.said[at:]
        self.flush()

    def flush(self) -> bool:
        """Whether nothing is left to be sent."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        if self.has_ended and not self._unsent and self.socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        return not self._unsent

    def shout(self) -> None:
        """An urgent byte, when nothing waits before it."""
        if not self._unsent:
            with contextlib.suppress(BlockingIOError):
                self.socket.send(URGENT, socket.MSG_OOB)

    def hear(self) -> None:
        """What has come. Raises OSError when the connection is broken."""
        with contextlib.suppress(BlockingIOError):
            while not self.heard_end:
                data = self.socket.recv(BUFFER_SIZE)
                self.heard += data
                self.heard_end = not data


class Scene:
    """A client, a server, and a connection of the relay between them."""

    def __init__(self, kind: type[Connection], *, is_slow: bool = False, first: int = 0) -> None:
        """`first` bytes are said before the upstream is dialled, so that epoll tells of them before it is reached."""
        self.loop = Loop()
        self.pool = PipePool()
        self._ports = HeldPorts(self.loop)
        exchange = Exchange(self.loop, {}, Hops(), self._ports, print, lambda _destination: True)
        context = Context(exchange, self.pool, memoryview(bytearray(BUFFER_SIZE)))
        self.endings: list[Ending] = []
        self.was_quick = False
        """Whether it still was when it ended."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        with socket.create_server(("127.0.0.1", 0)) as front:
            self.client = Side(socket.create_connection(front.getsockname()))
            number, _ = front._accept()  # type: ignore[attr-defined]
        accepted = Socket(socket.AF_INET, socket.SOCK_STREAM, 0, number)
        if is_slow:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        plan = Plan(
            (Dial(Destination(*self._listener.getsockname())),), Deadlines(self.loop, PATIENCE, Dialling.expire)
        )
        self.connection = kind(context, accepted, plan, self._done)
        self.client.say(first)
        self.connection.start()

    def _done(self, connection: Connection) -> None:
        self.endings.append(connection.ending)
        self.was_quick = self.is_quick

    @property
    def is_quick(self) -> bool:
        """Whether it is edge-triggered."""
        return bool(getattr(self.connection, "_is_quick", False))

    def accept(self) -> None:
        """Let the server have the connection."""
        self.server = Side(self._listener.accept()[0])

    def turn(self, times: int = 1) -> None:
        """Handle what has happened."""
        for _ in range(times):
            self.loop.later(0.0, self.loop.stop)
            self.loop.run()

    def settle(self) -> None:
        """Until everybody has heard everything, or the connection is over."""
        end = time.monotonic() + PATIENCE
        sides = (self.client, self.server)
        while time.monotonic() < end:
            self.turn()
            sent = [side.flush() for side in sides]
            for side in sides:
                if not side.is_deaf:
                    side.hear()
            if all(sent) and (self.endings or all(_has_all(one, other) for one, other in (sides, sides[::-1]))):
                self.turn()
                for side in sides:
                    side.hear()
                return
        raise AssertionError(f"heard {len(self.client.heard)} and {len(self.server.heard)} bytes")

    def end(self) -> list[Ending]:
        """How the connection has ended, once it has."""
        end = time.monotonic() + PATIENCE
        while not self.endings and time.monotonic() < end:
            self.turn()
        self.turn()
        return self.endings

    def remove(self) -> None:
        """Close everything."""
        if not self.endings:
            self.connection.reset(ConnectionAbortedError())
        for side in (self.client, getattr(self, "server", None)):
            if side is not None:
                side.socket.close()
        self._listener.close()
        for sock in self._ports._held:
            sock.close()
        self.loop.release()
        self.pool.close()


def _has_all(side: Side, other: Side) -> bool:
    heard = bytes(side.heard).replace(URGENT, b"")
    return len(heard) >= len(other.said) and (side.heard_end or not other.has_ended)


@contextlib.contextmanager
def scene(kind: type[Connection], *, is_slow: bool = False, first: int = 0) -> Iterator[Scene]:
    made = Scene(kind, is_slow=is_slow, first=first)
    try:
        yield made
    finally:
        made.remove()


def reached(at: Scene) -> None:
    """The upstream is reached."""
    at.turn(3)
    at.accept()


def assert_whole(at: Scene) -> None:
    assert bytes(at.server.heard).replace(URGENT, b"") == bytes(at.client.said)
    assert bytes(at.client.heard).replace(URGENT, b"") == bytes(at.server.said)


ACTIONS = st.tuples(
    st.sampled_from(("client", "server")),
    st.one_of(
        st.tuples(st.just("say"), st.sampled_from((1, 100, 5000, BUFFER_SIZE - 1, BUFFER_SIZE, 3 * BUFFER_SIZE))),
        st.tuples(st.sampled_from(("shout", "end", "hear", "turn")), st.just(0)),
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(ACTIONS, max_size=4),
    script=st.lists(ACTIONS, max_size=15),
    is_slow=st.booleans(),
    first=st.sampled_from((0, 10)),
)
def test_every_byte_arrives_whatever_happens_in_which_order(
    kind: type[Connection],
    before: list[tuple[str, tuple[str, int]]],
    script: list[tuple[str, tuple[str, int]]],
    is_slow: bool,
    first: int,
) -> None:
    with scene(kind, is_slow=is_slow, first=first) as at:
        for name, (action, size) in before:  # while the upstream is dialled
            if name == "client":
                act(at, at.client, action, size)
        reached(at)
        for name, (action, size) in script:
            act(at, at.client if name == "client" else at.server, action, size)
        for side in (at.client, at.server):
            side.has_ended = True
        at.settle()
        assert_whole(at)
        assert at.client.heard_end
        assert at.server.heard_end
        assert at.endings == [Ending.CLOSED]


def act(at: Scene, side: Side, action: str, size: int) -> None:
    """One step of a script."""
    if action == "turn":
        at.turn()
    elif action == "hear":
        side.hear()
    elif action == "end":
        side.has_ended = True
        side.flush()
    elif not side.has_ended:
        if action == "say":
            side.say(size)
        else:
            side.shout()


def test_small_messages_and_both_ends_need_no_other_watch() -> None:
    with scene(QuickConnection) as at:
        at.client.say(10)
        reached(at)
        for _ in range(5):
            at.settle()
            at.server.say(5000)
            at.settle()
            at.client.say(100)
        at.server.has_ended = True
        at.settle()
        assert at.client.heard_end
        assert at.is_quick
        at.client.say(7)
        at.client.has_ended = True
        at.settle()
        assert at.was_quick
        assert_whole(at)
        assert at.server.heard_end, "closing tells it"
        assert at.endings == [Ending.CLOSED]


def test_a_message_and_the_end_that_came_while_the_upstream_was_dialled() -> None:
    with scene(QuickConnection, first=10) as at:
        at.client.has_ended = True
        at.client.flush()
        reached(at)
        at.settle()
        assert at.is_quick
        assert at.server.heard_end
        at.server.say(10)
        at.server.has_ended = True
        at.settle()
        assert_whole(at)
        assert at.was_quick


def test_a_read_that_fills_the_buffer_changes_it_back_and_the_rest_arrives() -> None:
    with scene(QuickConnection) as at:
        reached(at)
        at.client.say(10 * BUFFER_SIZE)
        at.settle()
        assert not at.is_quick
        assert_whole(at)
        at.server.say(3)
        at.settle()
        assert_whole(at)


def test_a_full_sink_changes_it_back_and_nothing_more_is_read_until_it_takes_some() -> None:
    with scene(QuickConnection, is_slow=True) as at:
        reached(at)
        at.client.is_deaf = True
        at.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end = time.monotonic() + PATIENCE
        while at.is_quick and time.monotonic() < end:
            at.server.say(1000)
            at.turn()
        assert not at.is_quick
        assert not at.endings
        for _ in range(20):
            at.server.say(50_000)
            at.turn()
        assert at.connection.moved[1] < len(at.server.said) / 2, "no more than the kernel and one buffer take"
        at.client.is_deaf = False
        at.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # a small window takes 20 s
        at.settle()
        assert_whole(at)


@pytest.mark.parametrize("is_early", [True, False])
def test_bytes_behind_urgent_ones_arrive(is_early: bool) -> None:
    with scene(QuickConnection) as at:
        if not is_early:
            reached(at)
        at.client.say(10)
        at.client.shout()
        at.client.say(20)
        if is_early:
            reached(at)
        at.settle()
        assert not at.is_quick
        assert_whole(at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("breaks", "half"), [("client", ""), ("client", "server"), ("server", ""), ("server", "client")]
)
@pytest.mark.parametrize("said", [0, 10])
def test_a_reset_is_passed_on_as_one(kind: type[Connection], breaks: str, said: int, half: str) -> None:
    with scene(kind) as at:
        reached(at)
        at.client.say(5)
        at.settle()
        if half:
            ended = at.client if half == "client" else at.server
            ended.has_ended = True
            at.settle()
        broken, other = (at.client, at.server) if breaks == "client" else (at.server, at.client)
        broken.say(said)
        broken.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.socket.close()
        assert at.end() == [Ending.CLIENT_RESET if breaks == "client" else Ending.UPSTREAM_RESET]
        other.socket.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            other.hear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_resets_while_its_server_is_dialled_is_noticed(kind: type[Connection]) -> None:
    with scene(kind) as at:
        at.client.say(1)
        at.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        at.client.socket.close()
        assert at.end() == [Ending.CLIENT_RESET]


def test_an_idle_connection_wakes_nobody() -> None:
    with scene(QuickConnection) as at:
        at.client.say(10)
        reached(at)
        at.settle()
        at.turn(2)
        assert select.select([at.loop._epoll], [], [], 0.05)[0] == []
        at.server.has_ended = True
        at.settle()
        at.turn(2)
        assert select.select([at.loop._epoll], [], [], 0.05)[0] == []
