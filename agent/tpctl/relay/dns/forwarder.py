"""Forwards DNS queries over UDP to the name servers of resolv.conf, and their answers back.

Each query has a socket to itself as long as it waits, connected to one server (`outgoing`). An answer counts only under
the id that was drawn for this try and with the question that was asked (RFC 5452, 9.1). What arrives on the socket
under another id is a guess, of which few are allowed.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial
from select import EPOLLIN

from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.dns.message import Question, Rcode
from tpctl.relay.dns.outgoing import Outgoing, OutgoingSockets
from tpctl.relay.dns.upstreams import Plan, Upstreams
from tpctl.relay.dns.waiting import OF_OTHERS, OWN, Waiting, WaitingRoom
from tpctl.relay.loop import descriptors, packet_info
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.loop import EXHAUSTED, Loop
from tpctl.relay.loop.original_destination import unmapped
from tpctl.relay.loop.shares import Shares

MAX_QUERY = 4096
"""Longer queries are dropped; the largest EDNS size in use, and far beyond any query of a resolver."""
MAX_GUESSES = 16
"""Wrong answers on one socket, after which the query goes on under another port and id."""
_BATCH = 64
_PAUSE_SECONDS = 0.1
_DESCRIPTORS = {OWN: descriptors.DNS, OF_OTHERS: descriptors.DNS_OF_OTHERS}
_OUT_OF_DESCRIPTORS = "a DNS query failed: out of descriptors"
_MAX_MESSAGE = 65535
_TRUNCATED = int(socket.MSG_TRUNC)

LocalAnswer = Callable[[bytes, Question, bool], bytes | None]
"""The answer to a query that must not be forwarded, else None; the last argument says that it goes over UDP."""
Remembered = Callable[[bytes], bytes | None]
"""The answer that was given to the same query before, without looking at it; both without their ids."""


class Query:
    """A query on its way: to one name server after the other, until one answers."""

    __slots__ = (
        "deadlines", "fallback", "kind", "message", "outgoing", "plan", "question", "rest", "tries", "waiting",
    )  # fmt: skip

    def __init__(self, message: bytes, question: Question, plan: Plan, first: Waiting) -> None:
        self.message = message
        self.rest = message[2:]
        """What stands behind the id."""
        self.question = question
        self.plan = plan
        self.kind = _DESCRIPTORS[first.kind]
        """Whose descriptor it holds until it has an answer or is out of tries."""
        self.waiting = {first: None}
        self.tries = 0
        self.fallback: bytes | None = None
        """An answer that another server may have a better one for."""
        self.outgoing: Outgoing[Query] | None = None
        self.deadlines: Deadlines[Query] | None = None
        """Where it is while it waits for an answer."""


class DnsForwarder:
    """The UDP side of one worker's DNS listeners."""

    def __init__(
        self,
        loop: Loop,
        upstreams: Upstreams,
        *,
        local_answer: LocalAnswer,
        remembered: Remembered,
        counters: DnsCounters,
        complaints: Complaints,
        descriptors: Shares,
    ) -> None:
        self._loop = loop
        self._descriptors = descriptors
        self._upstreams = upstreams
        self._local_answer = local_answer
        self._remembered = remembered
        self._counters = counters
        self._complaints = complaints
        self._listeners: dict[socket.socket, Callable[[str], bool]] = {}
        self._queries: dict[bytes, Query] = {}
        """By what stands behind the id: equal queries share a socket, or each would be one more to guess right."""
        self._outgoing = OutgoingSockets[Query](loop, descriptors, self._on_answer)
        self._deadlines: dict[float, Deadlines[Query]] = {}
        """By the seconds that a server has."""
        self._room = WaitingRoom[Query]()
        self._draining = False
        self.idle: Callable[[], None] | None = None
        """Called whenever the last query has been answered."""

    @property
    def busy(self) -> int:
        """How many clients wait for an answer."""
        return len(self._room)

    def listen(self, listener: socket.socket, allows: Callable[[str], bool]) -> None:
        """Serve the queries of a socket for which `packet_info.enable` was called, from addresses that are allowed.

        Once more for the same socket, to allow others.
        """
        if listener not in self._listeners:
            self._loop.watch(listener.fileno(), EPOLLIN, partial(self._on_queries, listener))
        self._listeners[listener] = allows

    def leave(self, listener: socket.socket) -> None:
        """Serve a socket no more. It is closed here."""
        del self._listeners[listener]
        self._loop.close(listener)

    def drain(self, *, leave_waiting: bool) -> None:
        """Take no more queries; the sockets stay open for the answers that are due.

        `leave_waiting` leaves the queries that are not yet read to whoever else has the sockets.
        """
        self._draining = True
        for listener in self._listeners:
            if not leave_waiting:
                self._on_queries(listener, EPOLLIN)
            self._loop.forget(listener.fileno())

    def reset(self) -> None:
        """Give up every query."""
        for query in tuple(self._queries.values()):
            self._finish(query)

    def break_off(self, _error: Exception, subject: socket.socket | Outgoing[Query] | Query) -> None:
        """Refuse a query, or let a listener pause, because of an error that nobody expected (`Loop.contain`)."""
        if isinstance(subject, socket.socket):
            self._rest(subject)
            return
        query = subject if isinstance(subject, Query) else subject.query
        if query is not None and query.rest in self._queries:
            self._fail(query)
        elif isinstance(subject, Outgoing):
            self._outgoing.discard(subject)

    def _rest(self, listener: socket.socket) -> None:
        """Read nothing for a moment: what cannot be read would wake the loop over and over."""
        if listener in self._listeners and not self._draining:
            self._loop.forget(listener.fileno())
            self._loop.later(_PAUSE_SECONDS, partial(self._resume, listener))

    def _resume(self, listener: socket.socket) -> None:
        if listener not in self._listeners or self._draining:
            return
        try:
            self._loop.watch(listener.fileno(), EPOLLIN, partial(self._on_queries, listener))
        except OSError:
            self._rest(listener)

    def _on_queries(self, listener: socket.socket, _mask: int) -> None:
        allows = self._listeners[listener]
        receive = listener.recvmsg
        for _ in range(_BATCH):
            try:
                message, ancillary, flags, client = receive(MAX_QUERY, packet_info.ANCILLARY_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._complaints.warn("out of resources, reading DNS queries is paused", reason=error.strerror)
                    self._rest(listener)
                    return
                continue  # an error of an earlier answer, which recvmsg reports once (udp(7))
            if flags & _TRUNCATED or not dns_message.is_query(message):
                continue
            host = unmapped(client[0])
            if not allows(host):
                continue
            self._counters.udp += 1
            if self._outgoing.is_own((host, client[1])):
                self._complaints.warn(
                    "dropped: the relay's own DNS queries come back to it; does it run as the policy's data plane user?"
                )
                continue
            source, is_own = packet_info.origin(tuple(ancillary))
            known = self._remembered(message[2:])
            if known is not None:
                self._send(listener, message[:2] + known, source, client)
                continue
            kind = OWN if is_own else OF_OTHERS
            self._take(message, Waiting(listener, client, source, dns_message.message_id(message), kind))

    def _take(self, message: bytes, client: Waiting) -> None:
        question = dns_message.question_of(message)
        if question is None:
            self._counters.malformed += 1
            self._answer(client, dns_message.failure(message, Rcode.FORMERR, None))
            return
        local = self._local_answer(message, question, True)
        if local is not None:
            self._answer(client, local)
            return
        same = self._queries.get(message[2:])
        if same is None:
            self._forward(message, question, client)
        elif client in same.waiting:
            return  # sent again by a client that is waiting already
        elif self._enter(client, same):
            same.waiting[client] = None
        else:
            self._refuse(client, message, question)

    def _enter(self, client: Waiting, query: Query) -> bool:
        """Whether there is room for a client to wait; if need be, that of one whose address has more."""
        while not self._room.enter(client, query):
            if not self._send_one_away(client, query):
                self._complaints.warn("a DNS query failed: too many wait for an answer", pending=len(self._room))
                return False
        return True

    def _hold_descriptor(self, client: Waiting, query: Query) -> bool:
        """The same for a descriptor."""
        while not self._descriptors.take(query.kind):
            if not self._send_one_away(client, query):
                self._complaints.warn(_OUT_OF_DESCRIPTORS)
                return False
        return True

    def _send_one_away(self, newcomer: Waiting, query: Query) -> bool:
        """Have a client go without an answer so that another one has room; whether there was one."""
        found = self._room.in_the_way(newcomer)
        if found is None:
            return False
        client, its = found
        self._complaints.warn(
            "a DNS query failed: its client has more pending queries than others", client=client.client[0]
        )
        if len(its.waiting) > 1 or its is query:
            self._room.leave(client, its)
            del its.waiting[client]
            self._refuse(client, its.message, its.question)
        else:
            its.fallback = None
            self._fail(its)
        return True

    def _forward(self, message: bytes, question: Question, client: Waiting) -> None:
        plan = self._upstreams.plan()
        if not plan.servers:
            self._complaints.warn("a DNS query failed: there is no name server to ask")
            self._refuse(client, message, question)
            return
        query = Query(message, question, plan, client)
        if not self._hold_descriptor(client, query):
            self._refuse(client, message, question)
            return
        if not self._enter(client, query):
            self._descriptors.give(query.kind)
            self._refuse(client, message, question)
            return
        self._counters.forwarded += 1
        self._queries[query.rest] = query
        self._ask(query)

    def _refuse(self, client: Waiting, message: bytes, question: Question) -> None:
        self._counters.failed += 1
        failure = dns_message.failure(message, Rcode.SERVFAIL, question)
        self._answer(client, dns_message.with_id(failure, client.identifier))

    def _fail(self, query: Query) -> None:
        """Give the best answer there is; without one, the query has failed."""
        if query.fallback is None:
            self._counters.failed += len(query.waiting)
        failure = dns_message.failure(query.message, Rcode.SERVFAIL, query.question)
        self._finish(query, query.fallback or failure)

    def _ask(self, query: Query) -> None:
        """Ask the next server; out of servers, the query has failed."""
        # One answer is enough not to ask anybody twice.
        tries = len(query.plan.servers) if query.fallback is None else query.plan.distinct
        while query.tries < tries:
            server = query.plan.servers[query.tries]
            query.tries += 1
            try:
                outgoing = query.outgoing = self._outgoing.take(server, query)
                outgoing.sock.send(dns_message.with_id(query.message, outgoing.identifier))
            except OSError as error:
                self._hang_up(query)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._complaints.warn(_OUT_OF_DESCRIPTORS)
                    break
                self._upstreams.failed(server)
            else:
                seconds = query.plan.timeout_seconds
                query.deadlines = self._deadlines.get(seconds) or self._new_deadlines(seconds)
                query.deadlines.add(query)
                return
        self._fail(query)

    def _new_deadlines(self, seconds: float) -> Deadlines[Query]:
        made = self._deadlines[seconds] = Deadlines(self._loop, seconds, self._on_silence)
        return made

    def _on_silence(self, query: Query) -> None:
        assert query.outgoing is not None
        server = query.outgoing.server
        self._counters.timeouts += 1
        self._upstreams.failed(server)
        self._hang_up(query)
        self._outgoing.close_idle()  # they may have a source address that this host has no more
        self._ask(query)

    def _on_answer(self, outgoing: Outgoing[Query], _mask: int) -> None:
        query = outgoing.query
        try:
            message = outgoing.sock.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:  # the server does not listen, or cannot be reached
            if query is None:
                self._outgoing.discard(outgoing)
                return
            self._upstreams.failed(outgoing.server)
            self._hang_up(query)
            self._ask(query)
            return
        if query is None:
            self._counters.mismatched += 1
            self._outgoing.discard(outgoing)
        elif not dns_message.is_answer_to(message, outgoing.identifier, query.message, query.question):
            self._on_guess(outgoing, query)
        else:
            self._upstreams.answered(outgoing.server)
            query.outgoing = None
            self._outgoing.give(outgoing)
            self._on_message(query, message)

    def _on_message(self, query: Query, message: bytes) -> None:
        """What a server has answered."""
        if dns_message.rcode_of(message) in dns_message.ELSEWHERE and query.tries < query.plan.distinct:
            query.fallback = message
            self._hang_up(query)
            self._ask(query)
        else:
            self._finish(query, message)

    def _on_guess(self, outgoing: Outgoing[Query], query: Query) -> None:
        self._counters.mismatched += 1
        outgoing.strange += 1
        if outgoing.strange >= MAX_GUESSES:
            self._complaints.warn(
                "DNS answers are being guessed: asking again from another port", server=str(outgoing.server)
            )
            self._hang_up(query)
            self._ask(query)

    def _answer(self, client: Waiting, message: bytes) -> None:
        self._send(client.listener, message, client.ancillary, client.client)

    def _send(
        self,
        listener: socket.socket,
        message: bytes,
        ancillary: tuple[packet_info.Ancillary, ...],
        client: tuple[str, int],
    ) -> None:
        try:
            listener.sendmsg((message,), ancillary, 0, client)
        except OSError as error:  # the client will ask again
            self._complaints.warn("a DNS answer could not be sent", reason=error.strerror)

    def _hang_up(self, query: Query) -> None:
        """Wait no more for the server that was asked."""
        if query.deadlines is not None:
            query.deadlines.discard(query)
            query.deadlines = None
        if query.outgoing is not None:
            self._outgoing.discard(query.outgoing)
            query.outgoing = None

    def _finish(self, query: Query, answer: bytes | None = None) -> None:
        """Forget a query; with an answer, give it to all who wait for it."""
        self._hang_up(query)
        del self._queries[query.rest]
        self._descriptors.give(query.kind)
        for client in query.waiting:
            self._room.leave(client, query)
        if answer is not None:
            for client in query.waiting:
                self._answer(client, dns_message.with_id(answer, client.identifier))
        if not self._queries and self.idle is not None:
            self.idle()
