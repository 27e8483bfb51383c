"""DNS over TCP: takes the queries of a connection apart, and gives their answers as they come (RFC 7766)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import NamedTuple

from tpctl.relay.connections.acceptor import Acceptor
from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.forwarder import MAX_QUERY, LocalAnswer
from tpctl.relay.dns.message import Rcode
from tpctl.relay.dns.tcp_upstream import LENGTH_SIZE, Shared, TcpUpstream, framed, take_frame
from tpctl.relay.dns.waiting import OF_OTHERS, OWN
from tpctl.relay.loop.arrival import is_from_this_host
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.descriptors import A_CONNECTION, DNS, DNS_OF_OTHERS
from tpctl.relay.loop.loop import Timer
from tpctl.relay.loop.original_destination import recover, unmapped
from tpctl.relay.loop.shares import Shares

MAX_CLIENTS = 256
"""Connections, in one worker."""
KEPT = {OWN: MAX_CLIENTS // 2, OF_OTHERS: MAX_CLIENTS // 4}
"""Of these, so many are for nobody else."""
MAX_PENDING_PER_CLIENT = 64
"""Queries that wait for an answer; beyond that no more of the client are read."""
MAX_UNSENT = 256 * 1024
"""Octets of answers that the client has not taken; beyond that none of its queries are read."""
IDLE_SECONDS = 10.0
"""RFC 7766, 6.2.3: of the order of seconds."""
_DESCRIPTORS = {OWN: DNS, OF_OTHERS: DNS_OF_OTHERS}
_CHUNK = 4096
"""Read at a time. Some hundred queries at most, so that one client does not hold up the others."""


class Source(NamedTuple):
    """Whose a connection is."""

    kind: int
    """OWN or OF_OTHERS."""
    host: str


class DnsStream:
    """The connection of one client."""

    def __init__(
        self, streams: DnsStreams, client: Socket, source: Source, shared: Shared, local_answer: LocalAnswer
    ) -> None:
        self._streams = streams
        self.source = source
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

    def break_off(self, _error: Exception, *_arguments: object) -> None:
        """Close because of an error that nobody expected (`Loop.contain`)."""
        self.close()

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

    def __init__(self, shared: Shared, local_answer: LocalAnswer, complaints: Complaints, descriptors: Shares) -> None:
        self._shared = shared
        self._descriptors = descriptors
        self._places = Shares(MAX_CLIENTS, (KEPT[OWN], KEPT[OF_OTHERS]))
        self._local_answer = local_answer
        self._complaints = complaints
        self._acceptor = Acceptor(shared.loop, complaints, self._serve, lambda _name: None)
        self._allows: dict[str, Callable[[str], bool]] = {}
        self._streams: tuple[dict[str, dict[DnsStream, None]], ...] = ({}, {})
        """By kind and address of their clients; least recently active first."""
        self.idle: Callable[[], None] | None = None
        """Called whenever the last query has been answered."""

    @property
    def busy(self) -> int:
        """How many queries wait for an answer, or their answers to be taken."""
        return sum(max(stream.pending, stream.busy) for stream in self._all())

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
        for stream in tuple(self._all()):
            stream.finish()

    def reset(self) -> None:
        """Close every connection."""
        for stream in tuple(self._all()):
            stream.close()

    def touch(self, stream: DnsStream) -> None:
        """A stream is active."""
        kind, host = stream.source
        streams = self._streams[kind].get(host, {})
        if stream in streams:
            # Last of its address, and its address last.
            del streams[stream], self._streams[kind][host]
            streams[stream] = None
            self._streams[kind][host] = streams

    def forget(self, stream: DnsStream) -> None:
        """A stream has closed."""
        kind, host = stream.source
        streams = self._streams[kind].get(host, {})
        if stream in streams:
            del streams[stream]
            if not streams:
                del self._streams[kind][host]
            self._places.give(kind)
            self._descriptors.give(_DESCRIPTORS[kind], A_CONNECTION)
        self.rest()

    def _all(self) -> Iterator[DnsStream]:
        return (stream for hosts in self._streams for streams in hosts.values() for stream in streams)

    def _has_room(self, kind: int) -> bool:
        """Whether one more connection can be had; closes others of that kind until it can.

        That is the one that has been idle for longest, of the address that has most.
        """
        while not (self._places.has_room(kind) and self._descriptors.has_room(_DESCRIPTORS[kind], A_CONNECTION)):
            if not self._streams[kind]:
                return False
            most = max(self._streams[kind].values(), key=lambda streams: len(streams))
            next(iter(most)).close()
        return True

    def rest(self) -> None:
        """A stream has nothing to wait for any more."""
        if self.idle is not None and not self.busy:
            self.idle()

    def _serve(self, client: Socket, peer: tuple[str, int], name: str) -> None:
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
        kind = OWN if is_from_this_host(client, peer) else OF_OTHERS
        if not self._has_room(kind):
            self._complaints.warn("out of resources, a DNS connection is refused", client=host)
            client.close()
            return
        client.setblocking(False)
        stream = DnsStream(self, client, Source(kind, host), self._shared, self._local_answer)
        self._places.take(kind)
        self._descriptors.take(_DESCRIPTORS[kind], A_CONNECTION)
        self._streams[kind].setdefault(host, {})[stream] = None
