"""One relayed connection: two flows, half-close, and what happens when either end breaks.

Its states, in this order, each of which may be left out but the first and the last:

    DIALLING --> SHAKING_HANDS --> RELAYING --> HALF_CLOSED --> ENDED
                 TLS with the      two flows    one of them
                 upstream                       is done

Whether the kernel moves a flow's bytes is a matter of that flow alone (`acceleration.Stage`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP

from tpctl.relay.connections.acceleration import ChattyFlow, RedirectedFlow
from tpctl.relay.connections.dialling import Dialling
from tpctl.relay.connections.end_flow import EndFlow
from tpctl.relay.connections.ends import End, PlainEnd, TlsEnd
from tpctl.relay.connections.handshake import Handshake
from tpctl.relay.connections.plan import Context, Plan, UpstreamTls
from tpctl.relay.connections.pump import DONE, END, READ, WRITE, Flow, Wish
from tpctl.relay.connections.socket_options import keep_alive
from tpctl.relay.connections.states import Ending, State
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.failures import shown
from tpctl.relay.loop.original_destination import Destination

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_UNWATCHED = -1
_MAY_BE_HALF_CLOSED = (DONE, WRITE)
"""A source that is not read, because its sink is full, may have ended as well."""
_TCP_CLOSE = 7
"""net/tcp_states.h: a socket whose peer has reset it."""
AnyFlow = Flow | EndFlow | RedirectedFlow


class Connection:
    """Relays between a client that was accepted and the first of several dials that succeeds."""

    __slots__ = (
        "_client", "_client_mask", "_context", "_dialling", "_done", "_down", "_kept_alive", "_plan", "_seen",
        "_shaking", "_since", "_up", "_upstream", "_upstream_mask", "ending", "error", "state",
    )  # fmt: skip

    def __init__(self, context: Context, client: Socket, plan: Plan, done: Callable[[Connection], None]) -> None:
        self._context = context
        self._client = client
        self._plan = plan
        self._done = done
        self.state = State.DIALLING
        self._dialling = Dialling(context.exchange, plan.dials, plan.deadlines, self._on_reached, self._on_failed)
        self._upstream: Socket | None = None
        self._shaking: Handshake | None = None
        self._up: AnyFlow | None = None
        self._down: AnyFlow | None = None
        self._client_mask = 0
        self._upstream_mask = EPOLLIN
        self._seen = 0
        self._since = 0.0
        self._kept_alive = plan.keepalive is None
        self.error: OSError | None = None
        """Why the connection ended early, while `done` is told; None when both sides closed it."""
        self.ending = Ending.CLOSED

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed on to the upstream, and to the client."""
        return (self._up.moved if self._up else 0, self._down.moved if self._down else 0)

    @property
    def upstream(self) -> Destination:
        """Whom it was passed on to, or was last tried."""
        return self._dialling.destination

    def start(self) -> None:
        """Dial. The client is not read before somebody can take what it says."""
        self._client.setblocking(False)
        self._context.exchange.loop.watch(self._client.fileno(), 0, self._on_client)
        self._dialling.start()

    def reset(self, error: OSError, ending: Ending = Ending.TERMINATED) -> None:
        """End the connection, both ways, as broken: neither side must take it for complete."""
        if self.state is State.ENDED:
            return
        self.error = error
        self.ending = ending
        if ending is Ending.UPSTREAM_RESET:
            self._dialling.keep_port()
        for sock in (self._client, self._upstream):
            if sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._close()

    def break_off(self, error: Exception, *_arguments: object) -> None:
        """End the connection because of an error that nobody expected (`Loop.contain`)."""
        self.reset(OSError(errno.EIO, shown(error)), Ending.FAILED)

    def check_quiet(self, now: float) -> None:
        """End the connection if nothing has moved for too long. `now` is of time.monotonic().

        Called now and then, so that the bytes themselves need no clock.
        """
        up, down = self._up, self._down
        if up is None or down is None:
            return
        if not self._kept_alive and (up.wish in _MAY_BE_HALF_CLOSED or down.wish in _MAY_BE_HALF_CLOSED):
            self._keep_alive()
        moved = up.moved + down.moved
        if moved != self._seen or not self._since:
            self._seen, self._since = moved, now
            return
        half = self.state is State.HALF_CLOSED
        limit = self._plan.half_closed if half else self._plan.idle
        if limit and now - self._since >= limit:
            error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            self.reset(error, Ending.HALF_CLOSED if half else Ending.IDLE)

    def _keep_alive(self) -> None:
        """Let the kernel send probes, lest conntrack forgets a redirected connection of which one side has ended.

        It does so after a minute without a packet; the next one, which nobody translates then, is answered by a reset.
        """
        assert self._plan.keepalive is not None
        self._kept_alive = True
        for sock in (self._client, self._upstream):
            if sock is not None and sock.family != socket.AF_UNIX:
                keep_alive(sock, self._plan.keepalive)

    def _on_failed(self, error: OSError) -> None:
        self.reset(error, Ending.NOT_REACHED)

    def _on_reached(self, upstream: Socket, told: int) -> None:
        self._upstream = upstream
        self._since = time.monotonic()
        if self._plan.reached is not None:
            self._plan.reached(self._since)
        if self._plan.header and not self._announce(upstream):
            return
        secure = self._plan.upstream_tls
        if secure is not None:
            self._shake_hands(upstream, secure)
        elif self._plan.client is not None:
            self._flow_between(self._plan.client, PlainEnd(upstream))
        else:
            kind = Flow if self._context.accelerator is None else ChattyFlow
            self._up = kind(self._client, upstream, self._context.buffer, self._context.pool)
            self._down = kind(upstream, self._client, self._context.buffer, self._context.pool)
            self._begin(upstream, told)

    def _shake_hands(self, upstream: Socket, secure: UpstreamTls) -> None:
        """Begin TLS with the upstream; whoever it is must show a certificate before it hears of the client's bytes."""
        name = secure.tls.server_name or self._dialling.destination.host

        def done(error: OSError | None) -> None:
            secure.deadlines.discard(shaking)
            self._shaking = None
            if error is None:
                self._flow_between(self._plan.client or PlainEnd(self._client), shaking.end)
            else:
                self.reset(error, Ending.UPSTREAM_TLS)

        loop = self._context.exchange.loop
        self.state = State.SHAKING_HANDS
        shaking = self._shaking = Handshake(loop, upstream, TlsEnd(upstream, secure.tls, name), done)
        secure.deadlines.add(shaking)
        shaking.start()

    def _flow_between(self, client: End, upstream: End) -> None:
        assert self._upstream is not None
        self._up, self._down = EndFlow(client, upstream), EndFlow(upstream, client)
        self._begin(self._upstream, 0)
        # What OpenSSL has read together with the end of a handshake is not in the socket any more.
        try:
            self._up.move()
            self._down.move()
        except OSError as error:
            self.reset(error, self._who_reset())
        self._arm()

    def _begin(self, upstream: Socket, _told: int) -> None:
        """Wait for bytes of either side."""
        self.state = State.RELAYING
        loop = self._context.exchange.loop
        loop.watch(upstream.fileno(), EPOLLIN, self._on_upstream)
        self._upstream_mask = EPOLLIN
        if self._client_mask == _UNWATCHED:
            loop.watch(self._client.fileno(), EPOLLIN, self._on_client)
        else:
            loop.change(self._client.fileno(), EPOLLIN)
        self._client_mask = EPOLLIN

    def _announce(self, upstream: Socket) -> bool:
        """Whether the upstream has taken the header: a socket that has just been connected has room for it."""
        try:
            if upstream.send(self._plan.header) == len(self._plan.header):
                return True
            error = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        except OSError as failed:
            error = failed
        self.reset(error, Ending.NOT_REACHED)
        return False

    def _on_client(self, mask: int) -> None:
        up = self._up
        if mask == EPOLLIN and up is not None:  # nearly always
            try:
                if up.move():
                    return
            except OSError as error:
                self.reset(error, self._who_reset())
        else:
            self._client_mask = self._on_event(mask, self._client, self._client_mask, (up, self._down))
        self._arm()

    def _on_upstream(self, mask: int) -> None:
        assert self._upstream is not None
        down = self._down
        if mask == EPOLLIN and down is not None:  # nearly always
            try:
                if down.move():
                    return
            except OSError as error:
                self.reset(error, self._who_reset())
            self._arm()
            return
        self._upstream_mask = self._on_event(mask, self._upstream, self._upstream_mask, (self._down, self._up))
        self._arm()

    def _on_event(self, mask: int, sock: Socket, watched: int, flows: tuple[AnyFlow | None, AnyFlow | None]) -> int:
        """Move what the event allows; hands back what to watch the socket for. `flows`: what reads it and writes it."""
        reads, writes = flows
        try:
            if mask & EPOLLOUT and writes is not None:
                writes.move()
            if mask & EPOLLIN and reads is not None:
                reads.move()
            elif mask & EPOLLERR:
                # Not being read just now, so nobody else would find the reset.
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET
                if code != errno.EPIPE or not _can_do_without(reads, writes):
                    raise OSError(code, os.strerror(code))
                if sock is self._upstream:
                    self._dialling.keep_port()
                return self._look_away(sock)
            elif mask & EPOLLRDHUP and reads is not None:
                reads.move()
            elif mask & EPOLLHUP and not mask & EPOLLOUT:
                # Both sides have finished with this socket, but its last bytes wait for the other one. epoll reports
                # that without being asked, and again at once: look away until something is wanted of the socket.
                return self._look_away(sock)
        except OSError as error:
            self.reset(error, self._who_reset())
        return watched

    def _look_away(self, sock: Socket) -> int:
        self._context.exchange.loop.forget(sock.fileno())
        return _UNWATCHED

    def _who_reset(self) -> Ending:
        """Whose end is broken, as far as OpenSSL and the kernel know it."""
        if self._plan.client is not None and self._plan.client.is_broken:
            return Ending.CLIENT_RESET
        if self._upstream is None:
            return Ending.CLIENT_RESET
        is_unix = self._client.family == socket.AF_UNIX  # of whose end nobody tells
        asked = self._upstream if is_unix else self._client
        is_closed = asked.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
        return Ending.CLIENT_RESET if is_closed != is_unix else Ending.UPSTREAM_RESET

    def _arm(self) -> None:
        """Wait for what the flows wish; close when they wish nothing."""
        up, down = self._up, self._down
        if self.state is State.ENDED or up is None or down is None:
            return
        if up.wish is DONE and down.wish is DONE:
            self._close()
            return
        if up.wish is DONE or down.wish is DONE:
            self.state = State.HALF_CLOSED
        if up.is_chatty() and down.is_chatty():
            up, down = self._accelerate(up, down)
        client = _reading(up.wish) | (EPOLLOUT if down.wish is WRITE else 0)
        if client != self._client_mask:
            self._client_mask = self._watch(self._client, self._client_mask, client, self._on_client)
        upstream = _reading(down.wish) | (EPOLLOUT if up.wish is WRITE else 0)
        if upstream != self._upstream_mask:
            assert self._upstream is not None
            self._upstream_mask = self._watch(self._upstream, self._upstream_mask, upstream, self._on_upstream)

    def _accelerate(self, up: AnyFlow, down: AnyFlow) -> tuple[AnyFlow, AnyFlow]:
        """Let the kernel move the bytes from now on, if it can."""
        assert self._context.accelerator is not None
        assert isinstance(up, ChattyFlow)
        assert isinstance(down, ChattyFlow)
        flows = self._context.accelerator.take_over(up, down, self._on_nudge)
        if flows is None:
            up.stay()
            return up, down
        self._up, self._down = flows
        return flows

    def _on_nudge(self) -> None:
        """Something has become of bytes that the kernel moves, of which no event tells."""
        if self._up is None or self._down is None:
            return
        try:
            self._up.move()
            self._down.move()
        except OSError as error:
            self.reset(error, self._who_reset())
        self._arm()

    def _watch(self, sock: Socket, watched: int, wanted: int, handler: Callable[[int], None]) -> int:
        if watched != _UNWATCHED:
            self._context.exchange.loop.change(sock.fileno(), wanted)
        elif wanted:
            self._context.exchange.loop.watch(sock.fileno(), wanted, handler)
        else:
            return _UNWATCHED
        return wanted

    def _close(self) -> None:
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        if self._shaking is not None and self._plan.upstream_tls is not None:
            self._plan.upstream_tls.deadlines.discard(self._shaking)
        loop = self._context.exchange.loop
        for flow in (self._up, self._down):
            if flow is not None:
                loop.attempt(flow.abandon)
        loop.attempt(self._dialling.close)
        loop.hang_up(self._client)
        self._done(self)
        # What refers to each other is taken apart, so that it goes at once, without the garbage collector.
        self._up = self._down = self._shaking = None
        self.error = None  # its traceback leads back here
        del self._dialling, self._done


def _can_do_without(reads: AnyFlow | None, writes: AnyFlow | None) -> bool:
    """Whether nobody misses a peer of which EPIPE says that its reset came after its stream's end (tcp_reset(), Linux).

    A kernel forgets what a process has closed (tcp_fin_timeout), and then resets what comes, our probes too. What was
    said before may wait for a slow reader, here or in our kernel, and can still be read.
    """
    return reads is not None and reads.wish in _MAY_BE_HALF_CLOSED and (writes is None or writes.wish is not WRITE)


def _reading(wish: Wish) -> int:
    """The events of a source that a flow waits for."""
    return EPOLLIN if wish is READ else EPOLLRDHUP if wish is END else 0
