"""DNS over TCP: takes the queries of a connection apart, and gives their answers as they come (RFC 7766)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

from agent.relay import dns_message
from agent.relay.acceptor import Acceptor
from agent.relay.complaints import Complaints
from agent.relay.dns import MAX_QUERY, LocalAnswer
from agent.relay.dns_message import Rcode
from agent.relay.dns_tcp_upstream import LENGTH_SIZE, Shared, TcpUpstream, framed, take_frame
from agent.relay.loop import Timer
from agent.relay.original_destination import recover, unmapped

MAX_CLIENTS = 256
"""Connections, in one worker. The one that has been idle for longest makes room for a new one."""
MAX_PENDING_PER_CLIENT = 64
"""Queries that wait for an answer; beyond that no more of the client are read."""
MAX_UNSENT = 256 * 1024
"""Octets of answers that the client has not taken; beyond that none of its queries are read."""
IDLE_SECONDS = 10.0
"""RFC 7766, 6.2.3: of the order of seconds."""
_CHUNK = 4096
"""Read at a time. Some hundred queries at most, so that one client does not hold up the others."""


class DnsStream:
    """The connection of one client."""

    def __init__(self, streams: DnsStreams, client: socket.socket, shared: Shared, local_answer: LocalAnswer) -> None:
        self._streams = streams
        self._client = client
        self._shared = shared
        self._local_answer = local_answer
        self._upstream = TcpUpstream(shared, self._give)
        self._in = bytearray()
        self._out = bytearray()
        self._mask = EPOLLIN
        self._ended = False
        """Whether the client, or the relay, will ask nothing more."""
        self._closed = False
        self._called = False
        """Whether `_on_answers` will be called."""
        self._progress = time.monotonic()
        self._timer: Timer = shared.loop.later(IDLE_SECONDS, self._on_time)
        shared.loop.watch(client.fileno(), EPOLLIN, self._on_event)

    @property
    def pending(self) -> int:
        """How many queries wait for an answer."""
        return self._upstream.busy

    @property
    def busy(self) -> bool:
        """Whether there is an answer to wait for, or to be sent."""
        return bool(self._out or self._upstream.busy)

    def finish(self) -> None:
        """Read no more; close when everything is answered."""
        self._ended = True
        self._serve()

    def close(self) -> None:
        """Close, whatever is due."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._upstream.close()
        self._shared.loop.close(self._client)
        self._streams.forget(self)

    def _on_event(self, mask: int) -> None:
        try:
            if mask & EPOLLIN:
                self._read()
            elif mask & (EPOLLERR | EPOLLHUP):
                self.close()
            self._serve()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _read(self) -> None:
        data = self._client.recv(_CHUNK)
        if data:
            self._in += data
        else:
            self._ended = True

    def _take(self) -> None:
        """Take as many queries as may wait at once."""
        while not self._closed and self._has_room():
            message = take_frame(self._in)
            if message is None:
                if int.from_bytes(self._in[:LENGTH_SIZE], "big") > MAX_QUERY:
                    self.close()
                return
            self._progress = time.monotonic()
            self._streams.touch(self)
            self._query(message)

    def _has_room(self) -> bool:
        return self._upstream.busy < MAX_PENDING_PER_CLIENT and len(self._out) < MAX_UNSENT

    def _query(self, message: bytes) -> None:
        self._shared.counters.tcp += 1
        if not dns_message.is_query(message) or len(message) > MAX_QUERY:
            self.close()  # it speaks something else; RFC 7766, 8 would have us wait for it to do so again
            return
        question = dns_message.question_of(message)
        if question is None:
            self._shared.counters.malformed += 1
            self._out += framed(dns_message.failure(message, Rcode.FORMERR, None))
            return
        local = self._local_answer(message, question, False)
        if local is not None:
            self._out += framed(local)
        else:
            self._upstream.ask(message, question)

    def _give(self, answer: bytes) -> None:
        """An answer from a name server, or that there is none."""
        self._out += framed(answer)
        if not self._called:
            self._called = True
            # Not from within the upstream's own work: this may close it.
            self._shared.loop.later(0, self._on_answers)

    def _on_answers(self) -> None:
        self._called = False
        self._serve()

    def _serve(self) -> None:
        """Do all that can be done now."""
        self._send()
        self._take()
        self._send()
        if not self._closed:
            self._arm()

    def _send(self) -> None:
        try:
            if self._out and not self._closed:
                del self._out[: self._client.send(self._out)]
                self._progress = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _arm(self) -> None:
        """Wait for what is wanted; close when there is nothing more."""
        if self._ended and not self.busy:
            self.close()
            return
        mask = (EPOLLOUT if self._out else 0) | (EPOLLIN if not self._ended and self._has_room() else 0)
        if mask != self._mask:
            self._mask = mask
            self._shared.loop.change(self._client.fileno(), mask)
        if not self._upstream.busy and not self._out:
            self._streams.rest()

    def _on_time(self) -> None:
        """Close a client that asks nothing, or does not take its answers."""
        left = self._progress + IDLE_SECONDS - time.monotonic()
        if left <= 0 and (self._out or not self._upstream.busy):
            self.close()
            return
        self._timer = self._shared.loop.later(left if left > 0 else IDLE_SECONDS, self._on_time)


class DnsStreams:
    """The TCP side of one worker's DNS listeners."""

    def __init__(self, shared: Shared, local_answer: LocalAnswer, complaints: Complaints) -> None:
        self._shared = shared
        self._local_answer = local_answer
        self._complaints = complaints
        self._acceptor = Acceptor(shared.loop, complaints, self._serve, lambda _name: False)
        self._allows: dict[str, Callable[[str], bool]] = {}
        self._streams: dict[DnsStream, None] = {}
        """Least recently active first."""
        self.idle: Callable[[], None] | None = None
        """Called whenever the last query has been answered."""

    @property
    def busy(self) -> int:
        """How many queries wait for an answer, or their answers to be taken."""
        return sum(max(stream.pending, stream.busy) for stream in self._streams)

    def listen(self, listener: socket.socket, allows: Callable[[str], bool]) -> None:
        """Accept the connections of a listener whose source addresses are allowed; again, to allow others."""
        name = str(listener.fileno())
        if name not in self._allows:
            self._acceptor.listen(listener, name)
        self._allows[name] = allows

    def leave(self, listener: socket.socket) -> None:
        """Accept no more of its connections. It is closed here."""
        del self._allows[str(listener.fileno())]
        self._acceptor.leave(listener)

    def drain(self, *, leave_waiting: bool) -> None:
        """Accept and read nothing more; close each connection when its queries are answered.

        `leave_waiting` leaves the connections that are not yet accepted to whoever else has the listeners.
        """
        if leave_waiting:
            self._acceptor.stop()
        else:
            self._acceptor.drain()
        for stream in tuple(self._streams):
            stream.finish()

    def reset(self) -> None:
        """Close every connection."""
        for stream in tuple(self._streams):
            stream.close()

    def touch(self, stream: DnsStream) -> None:
        """A stream is active."""
        if stream in self._streams:
            del self._streams[stream]
            self._streams[stream] = None

    def forget(self, stream: DnsStream) -> None:
        """A stream has closed."""
        self._streams.pop(stream, None)
        self.rest()

    def rest(self) -> None:
        """A stream has nothing to wait for any more."""
        if self.idle is not None and not self.busy:
            self.idle()

    def _serve(self, client: socket.socket, peer: tuple[str, int], name: str) -> None:
        host = unmapped(peer[0])
        if not self._allows[name](host):
            client.close()
            return
        if (host, peer[1], recover(client, peer[0])) in self._shared.own:
            self._complaints.warn(
                "refused: the relay's own DNS queries come back to it; does it run as the policy's data plane user?"
            )
            client.close()
            return
        client.setblocking(False)
        while len(self._streams) >= MAX_CLIENTS:
            next(iter(self._streams)).close()
        self._streams[DnsStream(self, client, self._shared, self._local_answer)] = None
