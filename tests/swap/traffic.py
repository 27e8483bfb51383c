"""Traffic for the swap suite: servers that name themselves, and applications that open connections without pause.

Every server greets a connection with one byte, its name, and answers whatever it is sent with that name again. So an
application knows who answered after one byte, and a connection that is kept can be asked again later.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Any

from tpctl.rehearsal.namespaces import Namespace

APP, PROXY = 1000, 65534
REAL_PORT = 8080
OUTBOUND, INBOUND, REAL = b"O", b"I", b"R"
"""Who answers: the data plane's two listeners, or the server that was dialled."""

FAMILIES = (socket.AF_INET, socket.AF_INET6)
ANSWER_SECONDS = 30
_RUN, _PAUSE, _STOP = 0, 1, 2
_IDLE_SECONDS = 0.0005
_HURRY = 19
"""The nice value of applications and servers: they take what the swaps leave of the processors."""

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Route:
    """Where an application dials, and who has to answer."""

    family: socket.AddressFamily
    address: str
    expected: bytes
    port: int = REAL_PORT


def dial(route: Route) -> socket.socket:
    """A connection, greeted by nobody yet. Raises OSError."""
    made = socket.socket(route.family, socket.SOCK_STREAM)
    try:
        # The kernel's own time limit costs one system call; Python's would poll before every other one.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", ANSWER_SECONDS, 0))
        made.connect((route.address, route.port))
    except OSError:
        made.close()
        raise
    return made


class Child:
    """A forked process in a namespace, under a user. It says "ready" when `work` may be relied on."""

    def __init__(self, space: Namespace, uid: int, work: Callable[[Pipe], object]) -> None:
        self.pipe, theirs = _fork.Pipe()
        self.process = _fork.Process(target=self._main, args=(space, uid, work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"

    def _main(self, space: Namespace, uid: int, work: Callable[[Pipe], object], pipe: Pipe) -> None:
        self.pipe.close()
        os.nice(_HURRY)
        with space.inside(uid):
            pipe.send(work(pipe))

    def result(self) -> Any:
        """What `work` handed back, once it was told to end."""
        found = self.pipe.recv()
        self.process.join(10)
        return found


class Servers(Child):
    """Listeners of both families in one process, by port: the name each answers with."""

    def __init__(self, space: Namespace, uid: int, names: dict[int, bytes]) -> None:
        super().__init__(space, uid, lambda pipe: _serve(pipe, names))

    def stop(self) -> None:
        """End the process and its connections."""
        self.pipe.send("stop")
        self.result()


def _listeners(names: dict[int, bytes]) -> dict[int, tuple[socket.socket, bytes]]:
    made = {}
    for port, name in names.items():
        for family in FAMILIES:
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(("", port))
            listener.listen(4096)
            made[listener.fileno()] = (listener, name)
    return made


def _serve(pipe: Pipe, names: dict[int, bytes]) -> None:
    listeners = _listeners(names)
    clients: dict[int, tuple[socket.socket, bytes]] = {}
    poll = select.epoll()
    for number in (*listeners, pipe.fileno()):
        poll.register(number, select.EPOLLIN)
    pipe.send("ready")
    while True:
        for number, _ in poll.poll():
            if number in listeners:
                listener, name = listeners[number]
                with contextlib.suppress(OSError):
                    made, _ = listener.accept()
                    clients[made.fileno()] = (made, name)
                    poll.register(made.fileno(), select.EPOLLIN)
                    made.send(name)
            elif number in clients:
                client, name = clients[number]
                if not _answer(client, name):
                    del clients[number]
                    client.close()
            else:
                return


def _answer(client: socket.socket, name: bytes) -> bool:
    """Answer what was sent; False when the connection is over."""
    try:
        if not client.recv(64):
            return False
        client.send(name)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class _Count(ctypes.Structure):
    """What one application counts, in memory that it shares with the test."""

    _fields_ = [
        ("proxied", ctypes.c_ulonglong),
        ("leaked", ctypes.c_ulonglong),
        ("failed", ctypes.c_ulonglong),
        ("slowest", ctypes.c_double),
        ("idle", ctypes.c_int),
    ]


@dataclass(slots=True)
class Tally:
    """Connections by who answered, added up."""

    proxied: int = 0
    leaked: int = 0
    failed: int = 0
    slowest: float = 0.0
    """Of all connections so far, in seconds: a lost SYN is sent again after one."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why connections failed or what they leaked to."""

    @property
    def connections(self) -> int:
        """All of them."""
        return self.proxied + self.leaked + self.failed

    def __sub__(self, earlier: Tally) -> Tally:
        counts = (self.proxied - earlier.proxied, self.leaked - earlier.leaked, self.failed - earlier.failed)
        return Tally(*counts, self.slowest)

    def __iadd__(self, other: Tally) -> Tally:
        self.proxied += other.proxied
        self.leaked += other.leaked
        self.failed += other.failed
        self.slowest = max(self.slowest, other.slowest)
        self.reasons += other.reasons
        return self


class Applications:
    """Several processes, each of which opens one connection after the other along one route."""

    def __init__(self, routes: Sequence[tuple[Namespace, int, Route]]) -> None:
        """`routes` gives each process its namespace, its user and where it dials. They start paused."""
        self._control = _fork.RawValue(ctypes.c_int, _PAUSE)
        self._counts = _fork.RawArray(_Count, len(routes))
        self._children = [
            Child(space, uid, lambda pipe, count=count, route=route: self._work(pipe, count, route))  # type: ignore[misc]
            for count, (space, uid, route) in zip(self._counts, routes, strict=True)
        ]

    def resume(self) -> None:
        """Let them run, and wait until every one does."""
        self._turn(_RUN, idle=0)

    def pause(self) -> None:
        """Wait until each has ended its connection and opens no more."""
        self._turn(_PAUSE, idle=1)

    def tally(self) -> Tally:
        """What all have counted so far."""
        counts = list(self._counts)
        return Tally(
            sum(count.proxied for count in counts),
            sum(count.leaked for count in counts),
            sum(count.failed for count in counts),
            max(count.slowest for count in counts),
        )

    def at_least(self, connections: int) -> Tally:
        """What all have counted, once it is so many: where others take the processors, they get little of them."""
        deadline = time.monotonic() + 2 * ANSWER_SECONDS
        while (seen := self.tally()).connections < connections:
            assert time.monotonic() < deadline, f"{connections} connections are too much to ask: {seen}"
            time.sleep(_IDLE_SECONDS)
        return seen

    def stop(self) -> Tally:
        """End the processes; hands back everything they counted."""
        self._control.value = _STOP
        reasons: Counter[str] = Counter()
        for child in self._children:
            reasons += child.result()
        total = self.tally()
        total.reasons = reasons
        return total

    def _turn(self, control: int, idle: int) -> None:
        self._control.value = control
        deadline = time.monotonic() + 2 * ANSWER_SECONDS
        while any(count.idle != idle for count in self._counts):
            assert time.monotonic() < deadline, "an application hangs"
            time.sleep(_IDLE_SECONDS)

    def _work(self, pipe: Pipe, count: Any, route: Route) -> Counter[str]:
        reasons: Counter[str] = Counter()
        control = self._control
        count.idle = 1
        pipe.send("ready")
        while control.value != _STOP:
            if control.value == _PAUSE:
                count.idle = 1
                time.sleep(_IDLE_SECONDS)
                continue
            count.idle = 0
            started = time.monotonic()
            try:
                with dial(route) as made:
                    name = made.recv(1)
            except OSError as error:
                count.failed += 1
                reasons[f"{route.address}: {error}"] += 1
                continue
            count.slowest = max(count.slowest, time.monotonic() - started)
            if name == route.expected:
                count.proxied += 1
            elif name == REAL:
                count.leaked += 1
                reasons[f"{route.address}: leaked"] += 1
            else:
                count.failed += 1
                reasons[f"{route.address}: answered by {name!r}"] += 1
        return reasons


class Kept:
    """Connections that stay open and are asked again and again who is at the other end."""

    def __init__(self, space: Namespace, uid: int, routes: Sequence[Route]) -> None:
        with space.inside(uid):
            self.open = [(dial(route), route) for route in routes]
        for made, route in self.open:
            name = made.recv(1)
            assert name == route.expected, f"{route}: {name!r} answered"

    def broken(self) -> list[str]:
        """Those that do not answer any more, or as somebody else; they are dropped."""
        complaints = []
        for made, route in list(self.open):
            try:
                made.send(b"?")
                name = made.recv(1)
            except OSError as error:
                name = str(error).encode()
            if name != route.expected:
                complaints.append(f"{route.address}: {name.decode() or 'closed'}")
                made.close()
                self.open.remove((made, route))
        return complaints

    def close(self) -> None:
        """End them."""
        for made, _ in self.open:
            made.close()
        self.open.clear()
