"""Forwards DNS queries over UDP to the name servers of resolv.conf, and their answers back."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable, Sequence
from select import EPOLLIN
from typing import TYPE_CHECKING

from agent.relay import dns_message, packet_info
from agent.relay.complaints import Complaints
from agent.relay.dials import SelfDialGuard
from agent.relay.loop import Loop, Timer
from agent.relay.original_destination import Destination, unmapped

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

MAX_PENDING = 1024
"""Queries that wait for an answer, in one worker. Each holds a socket for at most the product of the two below."""
ATTEMPT_SECONDS = 2.0
MAX_ATTEMPTS = 4
_ROUNDS = 2
_BATCH = 64
_MAX_MESSAGE = 65535


class Query:
    """A query on its way: to one name server after the other, until one answers."""

    __slots__ = ("ancillary", "attempt", "client", "identifier", "local", "message", "servers", "timer", "upstream")

    def __init__(self, message: bytes, client: tuple[str, int], ancillary: list[packet_info.Ancillary]) -> None:
        self.message = message
        self.client = client
        self.ancillary = ancillary
        self.servers: Sequence[Destination] = ()
        self.attempt = 0
        self.identifier = 0
        self.local: tuple[str, int] | None = None
        self.upstream: socket.socket | None = None
        self.timer: Timer | None = None


class DnsForwarder:
    """The UDP side of one worker's DNS listener."""

    def __init__(
        self,
        loop: Loop,
        guard: SelfDialGuard,
        name_servers: Callable[[], Sequence[Destination]],
        log: FilteringBoundLogger,
    ) -> None:
        self._loop = loop
        self._guard = guard
        self._name_servers = name_servers
        self._complaints = Complaints(log)
        self._listener: socket.socket | None = None
        self._pending: set[Query] = set()
        self._own: set[tuple[str, int]] = set()
        self.idle: Callable[[], None] | None = None
        """Called whenever the last query has been answered."""

    @property
    def busy(self) -> int:
        """How many queries wait for an answer."""
        return len(self._pending)

    def listen(self, listener: socket.socket) -> None:
        """Serve the queries of a socket for which `packet_info.enable` was called."""
        self._listener = listener
        self._loop.watch(listener.fileno(), EPOLLIN, self._on_queries)

    def drain(self) -> None:
        """Take no more queries; the socket stays open for the answers that are due."""
        if self._listener is not None:
            self._on_queries(EPOLLIN)
            self._loop.forget(self._listener.fileno())

    def reset(self) -> None:
        """Give up every query."""
        for query in tuple(self._pending):
            self._finish(query)

    def _on_queries(self, _mask: int) -> None:
        assert self._listener is not None
        for _ in range(_BATCH):
            try:
                message, ancillary, _flags, client = self._listener.recvmsg(_MAX_MESSAGE, packet_info.ANCILLARY_SIZE)
            except BlockingIOError:
                return
            except OSError:
                continue  # an error of an earlier answer, which recvmsg reports once (udp(7))
            if dns_message.is_query(message):
                self._forward(Query(message, client, packet_info.answer_from(ancillary)))

    def _forward(self, query: Query) -> None:
        if (unmapped(query.client[0]), query.client[1]) in self._own:
            self._complaints.warn(
                "dropped: the relay's own DNS queries come back to it; does it run as the policy's data plane user?"
            )
            return
        servers = self._guard.others(self._name_servers())
        if not servers:
            self._complaints.warn("a DNS query failed: there is no name server to ask")
            self._answer(query, dns_message.server_failure(query.message))
        elif len(self._pending) >= MAX_PENDING:
            self._complaints.warn("a DNS query failed: too many wait for an answer", pending=MAX_PENDING)
            self._answer(query, dns_message.server_failure(query.message))
        else:
            query.servers = (servers * _ROUNDS)[:MAX_ATTEMPTS] if len(servers) < MAX_ATTEMPTS else servers
            self._pending.add(query)
            self._ask(query)

    def _ask(self, query: Query) -> None:
        """Ask the next server; out of servers, the query has failed."""
        self._hang_up(query)
        while query.attempt < len(query.servers):
            server = query.servers[query.attempt]
            query.attempt += 1
            try:
                self._send(query, server)
            except OSError as error:
                self._hang_up(query)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._complaints.warn("a DNS query failed: out of descriptors")
                    break
            else:
                query.timer = self._loop.later(ATTEMPT_SECONDS, lambda: self._ask(query))
                return
        self._answer(query, dns_message.server_failure(query.message))
        self._finish(query)

    def _send(self, query: Query, server: Destination) -> None:
        """Send a query from a socket of its own: an unpredictable port and id, and answers of that server only."""
        upstream = socket.socket(server.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        query.upstream = upstream
        # The kernel takes a random port of ip_local_port_range for a socket that is not bound.
        upstream.connect(server.sockaddr)
        query.identifier = secrets.randbits(16)
        host, port = upstream.getsockname()[:2]
        query.local = (host, port)
        self._own.add(query.local)
        upstream.send(dns_message.with_id(query.message, query.identifier))
        self._loop.watch(upstream.fileno(), EPOLLIN, lambda _mask: self._on_answer(query))

    def _on_answer(self, query: Query) -> None:
        assert query.upstream is not None
        try:
            message = query.upstream.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:  # the server does not listen, or cannot be reached
            self._ask(query)
            return
        if dns_message.is_answer(message, query.identifier):
            self._answer(query, dns_message.with_id(message, dns_message.message_id(query.message)))
            self._finish(query)

    def _answer(self, query: Query, message: bytes) -> None:
        assert self._listener is not None
        try:
            self._listener.sendmsg([message], query.ancillary, 0, query.client)
        except OSError as error:  # the client will ask again
            self._complaints.warn("a DNS answer could not be sent", reason=error.strerror)

    def _hang_up(self, query: Query) -> None:
        if query.timer is not None:
            query.timer.cancel()
            query.timer = None
        if query.local is not None:
            self._own.discard(query.local)
            query.local = None
        if query.upstream is not None:
            self._loop.close(query.upstream)
            query.upstream = None

    def _finish(self, query: Query) -> None:
        self._hang_up(query)
        self._pending.discard(query)
        if not self._pending and self.idle is not None:
            self.idle()
