"""The queries of one TCP client on their way to a name server, over TCP (RFC 7766)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from select import EPOLLIN, EPOLLOUT
from typing import NamedTuple

from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.dns.message import Question, Rcode
from tpctl.relay.dns.upstreams import Plan, Upstreams
from tpctl.relay.loop.loop import Loop, Timer
from tpctl.relay.loop.original_destination import Destination

Link = tuple[str, int, Destination]
"""Both ends of a connection to a name server."""
_CHUNK = 65536
LENGTH_SIZE = 2
"""RFC 1035, 4.2.2: each message has its length before it."""


def framed(message: bytes) -> bytes:
    """A message as it goes over TCP."""
    return len(message).to_bytes(LENGTH_SIZE, "big") + message


def take_frame(buffer: bytearray) -> bytes | None:
    """Take the first whole message out of what has been read; None when there is none."""
    if len(buffer) < LENGTH_SIZE:
        return None
    end = LENGTH_SIZE + int.from_bytes(buffer[:LENGTH_SIZE], "big")
    if len(buffer) < end:
        return None
    message = bytes(buffer[LENGTH_SIZE:end])
    del buffer[:end]
    return message


class Shared(NamedTuple):
    """What all TCP clients of a worker share."""

    loop: Loop
    upstreams: Upstreams
    counters: DnsCounters
    own: set[Link]
    """The connections this worker has opened to name servers."""


class Pending(NamedTuple):
    """A query that has no answer yet."""

    message: bytes
    question: Question
    since: float
    """When it was sent to the present server (time.monotonic)."""


class TcpUpstream:
    """One connection to a name server at a time, opened when there is a query and kept while the server does.

    When it fails, all queries without an answer go to the next server.
    """

    def __init__(self, shared: Shared, answer: Callable[[bytes], None]) -> None:
        self._shared = shared
        self._give = answer
        self._pending: dict[int, Pending] = {}
        self._plan = Plan((), 0, 0.0)
        self._tries = 0
        self._sock: socket.socket | None = None
        self._link: Link | None = None
        self._mask = 0
        self._connected = False
        self._answered: float | None = None
        """When this connection last brought an answer (time.monotonic)."""
        self._out = bytearray()
        self._in = bytearray()
        self._timer: Timer | None = None

    @property
    def busy(self) -> int:
        """How many queries wait for an answer."""
        return len(self._pending)

    def ask(self, message: bytes, question: Question) -> None:
        """Ask; the answer comes later, and SERVFAIL when nobody has one."""
        identifier = secrets.randbits(16)
        while identifier in self._pending:
            identifier = secrets.randbits(16)
        self._shared.counters.forwarded += 1
        self._pending[identifier] = Pending(message, question, time.monotonic())
        if self._sock is None:
            self._plan = self._shared.upstreams.plan()
            self._tries = 0
            self._dial_next()
            return
        self._watch_time()
        self._out += framed(dns_message.with_id(message, identifier))
        if self._connected:
            try:
                self._write()
            except OSError:
                self._on_end()

    def close(self) -> None:
        """Hang up, and forget what was asked."""
        self._pending.clear()
        self._hang_up()

    def break_off(self, _error: Exception, *_arguments: object) -> None:
        """Hang up, and answer what was asked, because of an error that nobody expected (`Loop.contain`)."""
        self._hang_up()
        failed, self._pending = self._pending, {}
        self._fail(failed.values())

    def _dial_next(self) -> None:
        self._hang_up()
        while self._pending and self._tries < len(self._plan.servers):
            server = self._plan.servers[self._tries]
            self._tries += 1
            try:
                self._dial(server)
            except OSError:
                self._hang_up()
                self._shared.upstreams.failed(server)
            else:
                return
        failed, self._pending = self._pending, {}
        self._fail(failed.values())

    def _dial(self, server: Destination) -> None:
        sock = self._sock = socket.socket(server.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(server.sockaddr)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        host, port = sock.getsockname()[:2]
        self._link = (host, port, server)
        self._shared.own.add(self._link)
        now = time.monotonic()
        self._pending = {identifier: query._replace(since=now) for identifier, query in self._pending.items()}
        for identifier, query in self._pending.items():
            self._out += framed(dns_message.with_id(query.message, identifier))
        self._mask = EPOLLOUT
        self._shared.loop.watch(sock.fileno(), EPOLLOUT, partial(self._on_event, server))
        self._watch_time()

    def _watch_time(self) -> None:
        """Wake up when the oldest query has waited for too long, unless that is arranged."""
        if self._timer is None and self._pending:
            oldest = next(iter(self._pending.values()))
            left = max(0.0, oldest.since + self._plan.timeout_seconds - time.monotonic())
            self._timer = self._shared.loop.later(left, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        limit = time.monotonic() - self._plan.timeout_seconds
        late = [identifier for identifier, query in self._pending.items() if query.since <= limit]
        if not late:
            self._watch_time()
            return
        self._shared.counters.timeouts += len(late)
        if self._answered is None or self._answered < self._pending[late[0]].since:
            self._next_server()
            return
        # The server is alive and has no answer to these; the others need not suffer for it.
        failed = [self._pending.pop(identifier) for identifier in late]
        self._watch_time()
        self._fail(failed)

    def _fail(self, queries: Iterable[Pending]) -> None:
        for query in queries:
            self._shared.counters.failed += 1
            self._give(dns_message.failure(query.message, Rcode.SERVFAIL, query.question))

    def _next_server(self) -> None:
        """Give the present server up, and with it its connection."""
        assert self._link is not None
        self._shared.upstreams.failed(self._link[2])
        self._dial_next()

    def _on_event(self, server: Destination, mask: int) -> None:
        assert self._sock is not None
        try:
            if not self._connected:
                code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                self._connected = True
            if mask & ~EPOLLOUT and not self._read(server):
                return
            if self._sock is not None:
                self._write()
        except BlockingIOError:
            pass
        except OSError:
            self._on_end()

    def _read(self, server: Destination) -> bool:
        """Whether the connection goes on."""
        assert self._sock is not None
        data = self._sock.recv(_CHUNK)
        if not data:
            self._on_end()
            return False
        self._in += data
        while (message := take_frame(self._in)) is not None:
            self._on_answer(message, server)
            if self._sock is None:
                return False
        return True

    def _on_answer(self, message: bytes, server: Destination) -> None:
        identifier = dns_message.message_id(message)
        query = self._pending.get(identifier)
        if query is None or not dns_message.is_answer_to(message, identifier, query.message, query.question):
            self._shared.counters.mismatched += 1
            return
        del self._pending[identifier]
        self._answered = time.monotonic()
        self._shared.upstreams.answered(server)
        self._give(dns_message.with_id(message, dns_message.message_id(query.message)))

    def _on_end(self) -> None:
        """The server has closed, or broken, the connection."""
        if self._pending and self._answered is not None:
            self._tries -= 1  # some servers answer a few queries on a connection, or one: that is no failure
            self._dial_next()
        elif self._pending:
            self._next_server()
        else:
            self._hang_up()

    def _write(self) -> None:
        assert self._sock is not None
        if self._out:
            with contextlib.suppress(BlockingIOError):
                del self._out[: self._sock.send(self._out)]
        mask = EPOLLIN | EPOLLOUT if self._out else EPOLLIN
        if mask != self._mask:
            self._mask = mask
            self._shared.loop.change(self._sock.fileno(), mask)

    def _hang_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            self._shared.own.discard(self._link)
            self._link = None
        if self._sock is not None:
            self._shared.loop.close(self._sock)
            self._sock = None
        self._connected = False
        self._answered = None
        self._out = bytearray()
        self._in = bytearray()
