"""Traffic for the long run: applications that know who answered them, and servers that know who passed it on.

The relay begins every connection to a server with a PROXY protocol header, so a server can tell a connection that came
through it (P) from one that came past it (R). Names of the zone `mesh` are known to the relay alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Any

from tests.netns.relay.dns_net import answer_to, query
from tests.netns.relay.net import pattern
from tests.swap.traffic import Child
from tpctl.rehearsal.namespaces import Namespace

PORT = 8080
THROUGH, PAST = b"P", b"R"
WHOLE, ECHO = b"W", b"E"
"""How a client begins: everything is read before it comes back, or each piece comes back at once."""
NAME_SERVER = {socket.AF_INET: "203.0.113.53", socket.AF_INET6: "2001:db8:53::53"}
VIRTUAL, ANSWERED = b"\xf0\x00\x00\x01", b"\xcb\x00\x71\x42"
"""What the relay's zone has for db.mesh, and what the name server has for everything."""
ANSWER_SECONDS = 20
_DNS_SECONDS, _DNS_TRIES = 3.0, 4
_PAUSE_SECONDS = 0.03
_LASTING_SECONDS = 6.0
_BULK_EVERY, _BULK = 40, 384 * 1024
_RUN, _STOP = 0, 1
_fork = get_context("fork")


@dataclass(frozen=True, slots=True)
class Way:
    """Where an application dials."""

    family: socket.AddressFamily
    address: str
    asks_names: bool
    """Whether it resolves names as well: those who leave the host do."""


class _Count(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in ("connections", "lasting", "queries", "lost", "misdirected", "excused", "megabytes")
    ]


@dataclass(slots=True)
class Seen:
    """What all applications have seen."""

    connections: int = 0
    lasting: int = 0
    """Connections that stayed open for seconds."""
    queries: int = 0
    lost: int = 0
    misdirected: int = 0
    excused: int = 0
    """Lost or misdirected while something was done that does that."""
    megabytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class Window:
    """Times in which connections may be lost or go past the relay, as everybody sees them."""

    def __init__(self) -> None:
        self._open = _fork.RawValue(ctypes.c_int, 0)
        self._times = _fork.RawValue(ctypes.c_int, 0)

    @contextlib.contextmanager
    def opened(self) -> Any:
        """For the length of the block, and what had begun by its end."""
        self._times.value += 1
        self._open.value = 1
        try:
            yield
        finally:
            self._open.value = 0

    def begin(self) -> int | None:
        """What `excuses` is asked with later."""
        return None if self._open.value else int(self._times.value)

    def excuses(self, begun: int | None) -> bool:
        """Whether one was open at any time since then."""
        return begun is None or bool(self._open.value) or begun != self._times.value


class Applications:
    """One process for each way, which dials, asks and keeps connections open without end."""

    def __init__(self, ways: Sequence[tuple[Namespace, int, Way]], window: Window) -> None:
        self._window = window
        self._control = _fork.RawValue(ctypes.c_int, _RUN)
        self._counts = _fork.RawArray(_Count, len(ways))
        self._children = [
            Child(space, uid, lambda pipe, count=count, way=way: self._work(pipe, count, way))  # type: ignore[misc]
            for count, (space, uid, way) in zip(self._counts, ways, strict=True)
        ]

    def seen(self) -> Seen:
        """So far, without reasons."""
        names = [entry[0] for entry in _Count._fields_]
        return Seen(*(sum(getattr(count, name) for count in self._counts) for name in names))

    def stop(self) -> Seen:
        """End them; hands back everything, with the reasons of what went wrong outside of windows."""
        self._control.value = _STOP
        reasons: Counter[str] = Counter()
        for child in self._children:
            reasons += child.result()
        seen = self.seen()
        seen.reasons = reasons
        return seen

    def _work(self, pipe: Pipe, count: Any, way: Way) -> Counter[str]:
        application = _Application(way, count, self._window)
        pipe.send("ready")
        while self._control.value != _STOP:
            application.turn()
            time.sleep(_PAUSE_SECONDS)
        application.close()
        return application.reasons


class _Application:
    def __init__(self, way: Way, count: Any, window: Window) -> None:
        self.way = way
        self.count = count
        self.window = window
        self.reasons: Counter[str] = Counter()
        self.draw = random.Random(way.address)
        self.turns = 0
        self.bulk = pattern(_BULK)
        self.lasting: tuple[socket.socket, float, int | None] | None = None

    def turn(self) -> None:
        """One connection, now and then a long one, a query, and a word on the connection that lasts."""
        self.turns += 1
        begun = self.window.begin()
        is_bulk = self.turns % _BULK_EVERY == 0
        size = _BULK if is_bulk else self.draw.randint(1, 3000)
        self._judged("connection", begun, lambda: self._whole(self.bulk[:size]))
        self.count.connections += 1
        if self.way.asks_names and self.turns % 5 == 0:
            begun = self.window.begin()
            self._judged("query", begun, self._ask)
            self.count.queries += 1
        if self.turns % 8 == 0:
            self._last()

    def close(self) -> None:
        """Let go of what lasts."""
        if self.lasting:
            self.lasting[0].close()

    def _judged(self, what: str, begun: int | None, act: Any) -> bool:
        try:
            act()
        except _MisdirectedError as error:
            self._wrong(what, begun, "misdirected", str(error))
        except OSError as error:
            self._wrong(what, begun, "lost", str(error))
        else:
            return True
        return False

    def _wrong(self, what: str, begun: int | None, kind: str, reason: str) -> None:
        if self.window.excuses(begun):
            self.count.excused += 1
            return
        setattr(self.count, kind, getattr(self.count, kind) + 1)
        at = time.strftime("%H:%M:%S")
        self.reasons[f"{kind}: {what} to {self.way.address} at {at}: {reason}"] += 1

    def _dial(self) -> socket.socket:
        made = socket.socket(self.way.family, socket.SOCK_STREAM)
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                made.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", ANSWER_SECONDS, 0))
            made.connect((self.way.address, PORT))
        except OSError:
            made.close()
            raise
        return made

    def _whole(self, payload: bytes) -> None:
        with self._dial() as made:
            made.sendall(WHOLE + payload)
            made.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: made.recv(1 << 18), b""))
        _check(answer, WHOLE + payload)
        if len(payload) == _BULK:
            self.count.megabytes += 2 * _BULK // (1 << 20) or 1

    def _last(self) -> None:
        """A word on a connection that is open for some seconds, through whatever happens meanwhile."""
        if self.lasting is None:
            begun = self.window.begin()
            self._judged("lasting connection", begun, lambda: self._open(begun))
            return
        made, since, begun = self.lasting
        if not self._judged("lasting connection", begun, lambda: _word(made)):
            self._end()
        elif time.monotonic() - since > _LASTING_SECONDS:
            self.count.lasting += 1
            self._end()

    def _end(self) -> None:
        self.close()
        self.lasting = None

    def _open(self, begun: int | None) -> None:
        made = self._dial()
        try:
            made.sendall(ECHO)
            _check(_exactly(made, 2), ECHO)
        except OSError:
            made.close()
            raise
        self.lasting = (made, time.monotonic(), begun)

    def _ask(self) -> None:
        """A name that the relay knows, or one that it forwards; several times, as resolvers do."""
        is_virtual = self.turns % 10 == 0
        labels = [b"db", b"mesh"] if is_virtual else [b"n%d" % self.turns, b"example"]
        question = b"".join(bytes([len(label)]) + label for label in labels) + b"\0\0\1\0\1"
        wanted = VIRTUAL if is_virtual else ANSWERED
        identifier = self.draw.randrange(1 << 16)
        for left in reversed(range(_DNS_TRIES)):
            with socket.socket(self.way.family, socket.SOCK_DGRAM) as asking:
                asking.settimeout(_DNS_SECONDS)
                try:
                    asking.connect((NAME_SERVER[self.way.family], 53))
                    asking.send(query(identifier, question))
                    answer = asking.recv(4096)
                except OSError:
                    if not left:
                        raise
                    continue
            if not answer.endswith(wanted):
                raise _MisdirectedError(f"the answer was {answer!r}")
            return


class _MisdirectedError(Exception):
    """Somebody else answered."""


def _check(answer: bytes, sent: bytes) -> None:
    if answer[:1] == PAST:
        raise _MisdirectedError(f"it went past the relay: the server was called by {answer[1:].decode()[:60]}")
    if answer != THROUGH + sent:
        raise ConnectionError(f"{len(answer)} bytes came back of {len(sent) + 1}")


def _word(made: socket.socket) -> None:
    made.sendall(b"word")
    if _exactly(made, 4) != b"word":
        raise ConnectionError("it was closed")


def _exactly(made: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := made.recv(size - len(found))):
        found += more
    return found


class Servers(Child):
    """Servers of both families in one process, and a name server where there is to be one."""

    def __init__(self, space: Namespace, uid: int, *, names: bool) -> None:
        super().__init__(space, uid, lambda pipe: asyncio.run(_serve(pipe, names)))

    def stop(self) -> None:
        """End the process."""
        self.pipe.send("stop")
        self.result()


class _NameServer(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(answer_to(data, ANSWERED[3]), addr)


async def _serve(pipe: Pipe, names: bool) -> None:
    loop = asyncio.get_running_loop()
    for host in ("0.0.0.0", "::"):
        await asyncio.start_server(_client, host, PORT, backlog=4096)
        if names:
            made = socket.socket(socket.AF_INET6 if host == "::" else socket.AF_INET, socket.SOCK_DGRAM)
            if host == "::":
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((host, 53))
            await loop.create_datagram_endpoint(_NameServer, sock=made)
    ended = asyncio.Event()
    loop.add_reader(pipe.fileno(), ended.set)
    pipe.send("ready")
    await ended.wait()


async def _client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        via, first = PAST, await reader.readexactly(1)
        if first == THROUGH:  # of PROXY
            await reader.readuntil(b"\r\n")
            via, first = THROUGH, await reader.readexactly(1)
        if via == PAST:
            writer.write(via + str(writer.get_extra_info("peername")[:2]).encode())
        elif first == WHOLE:
            writer.write(via + first + await reader.read(-1))
        else:
            writer.write(via + first)
            while data := await reader.read(1 << 16):
                writer.write(data)
        await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
