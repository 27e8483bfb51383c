"""Reaching an upstream: one dial after the other, until one succeeds."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from typing import NamedTuple

from tpctl.relay.connections import client_ports
from tpctl.relay.connections.dials import Dial
from tpctl.relay.connections.held_ports import HeldPorts
from tpctl.relay.connections.hops import Hops, Link
from tpctl.relay.loop import sock_diag
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.failures import shown
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination

IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h: choose the source port at connect(), so that every destination has all ports for itself."""

_INFO = struct.Struct("=44xI4xI72xQ")
"""linux/tcp.h, struct tcp_info: tcpi_last_data_sent and tcpi_last_data_recv, milliseconds ago, both since the beginning
while there was none; tcpi_bytes_received."""
EDGES = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET
"""What a socket is watched for from its dial on: all that a `QuickConnection` wants to know of it later."""
_FAILED = EPOLLERR | EPOLLHUP
_SAME_TIME_MS = 50
_INTERRUPTED_SECONDS, _LOOKS = 0.01, 10


def are_one(dial: Socket, accepted: Socket) -> bool:
    """Whether an accepted socket is the far end of our own dial, whose ends its own name already shows.

    The name is no proof: two connections of one client port to different servers are redirected to the same listener,
    so the kernel gives one of them another source port, which may be that of a dial. But what has come back was
    established on both sides at the same time, and nobody can have answered it.
    """
    try:
        return _began_together(lambda: dial.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size), accepted)
    except OSError:
        return False


def is_of_this_relay(link: Link, accepted: Socket) -> bool:
    """The same for a dial of another worker, which `Hops` knows by these ends: its socket is asked of the kernel.

    An application may have taken the port when the dial had just ended. But its socket belongs to another user.
    """
    host, port, destination = link

    def info() -> bytes:
        found = sock_diag.connection(destination._replace(host=host, port=port), (destination.host, destination.port))
        return found.tcp_info if found is not None and found.uid == os.geteuid() else b""

    try:
        return _began_together(info, accepted)
    except OSError:
        return False


def _began_together(dial: Callable[[], bytes], accepted: Socket) -> bool:
    """Whether an accepted socket was established when a dial was, whose tcp_info shows no answer.

    The kernel says how long ago. So it is asked again about both when this process was interrupted between the two.
    """
    for _ in range(_LOOKS):
        begin = time.monotonic()
        info = dial()
        since_accepted, _, _ = _INFO.unpack(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
        if time.monotonic() - begin < _INTERRUPTED_SECONDS:
            break
    if len(info) < _INFO.size:
        return False
    _, since_established, received = _INFO.unpack_from(info)
    return not received and abs(since_established - since_accepted) <= _SAME_TIME_MS


class OwnDial(NamedTuple):
    """A connection that the relay has opened itself, which the kernel may bring back to it.

    Two things bring dials back. When the relay does not run as the policy's data plane user, all of them are
    redirected. And conntrack remembers a redirected connection that was reset by its server's side, in the state CLOSE,
    for ten seconds (nf_conntrack_tcp_timeout_close); a SYN of the same addresses and ports does not begin anew then, as
    it does after any other end (nf_conntrack_proto_tcp.c, TCP_CONNTRACK_SYN_SENT), but is redirected like the first
    one. The application's socket is gone, so the kernel may well choose its port for a dial of the relay.
    """

    socket: Socket
    dial: Dial


class Exchange(NamedTuple):
    """What all dials of a worker share."""

    loop: Loop
    own_dials: dict[Link, OwnDial]
    """The connections this worker has opened itself."""
    hops: Hops
    ports: HeldPorts
    missing_source: Callable[[str], None]
    """Told when an address to dial from does not exist on this host."""
    serves_every_address: Callable[[Destination], bool]
    """Whether what listens at a loopback destination listens at the host's other addresses too."""


class Dialling:
    """Tries dials in turn. Calls `reached` with a connected socket and its events, or `failed` with the last reason.

    The socket is still watched then, edge-triggered: whoever gets it watches it otherwise, or goes on so.
    """

    __slots__ = ("_attempt", "_deadlines", "_dials", "_exchange", "_failed", "_link", "_reached", "_socket")

    def __init__(
        self,
        exchange: Exchange,
        dials: Sequence[Dial],
        deadlines: Deadlines[Dialling],
        reached: Callable[[Socket, int], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._exchange = exchange
        self._dials = dials
        self._deadlines = deadlines
        self._reached = reached
        self._failed = failed
        self._attempt = 0
        self._socket: Socket | None = None
        self._link: Link | None = None

    @property
    def destination(self) -> Destination:
        """What is being dialled, or was reached."""
        return self._dials[max(self._attempt - 1, 0)].destination

    def start(self) -> None:
        """Dial."""
        self._next(OSError(errno.EHOSTUNREACH, "nowhere to dial"))

    def expire(self) -> None:
        """The attempt has had its time."""
        self._drop()
        self._next(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def keep_port(self) -> None:
        """The server has reset the connection, so its port is free."""
        if self._link is not None and self._dials[self._attempt - 1].source is None:
            self._exchange.ports.hold(self._link.host, self._link.port)

    def break_off(self, error: Exception, *_arguments: object) -> None:
        """Fail because of an error that nobody expected (`Loop.contain`)."""
        self._failed(OSError(errno.EIO, shown(error)))

    def close(self) -> None:
        """Give up, or hang up."""
        self._deadlines.discard(self)
        self._drop()

    def _next(self, error: OSError) -> None:
        """Try the dials that are left; `error` is why the one before failed."""
        while self._attempt < len(self._dials):
            dial = self._dials[self._attempt]
            self._attempt += 1
            try:
                self._dial(dial)
            except OSError as failed:
                error = failed
                self._drop()
            else:
                self._deadlines.add(self)
                return
        self._failed(error)

    def _dial(self, dial: Dial) -> None:
        upstream, destination = self._bound(dial)
        hops = self._exchange.hops
        hops.begin(destination)
        try:
            code = upstream.connect_ex(destination.sockaddr)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            host, port = upstream.getsockname()[:2]
            self._link = link = Link(host, port, destination)
            hops.note(link, dial.hops)
        finally:
            hops.made()
        self._exchange.own_dials[link] = OwnDial(upstream, dial)
        self._exchange.loop.watch(upstream.fileno(), EDGES, self._on_event)

    def _bound(self, dial: Dial) -> tuple[Socket, Destination]:
        """A socket, and what to dial with it."""
        for left in reversed(range(client_ports.SOCKETS)):
            upstream = Socket(dial.destination.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._socket = upstream
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                return upstream, self._bind(upstream, dial)
            except client_ports.NoPortError:
                self._drop()
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _bind(self, upstream: Socket, dial: Dial) -> Destination:
        """Choose the source address; returns what to dial from there."""
        if dial.source is None:
            if dial.privileged:
                client_ports.bind_privileged(upstream)
            return dial.destination
        if dial.transparent:
            client_ports.bind(upstream, dial.source, dial.destination)
            return dial.destination
        try:
            upstream.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            upstream.bind((dial.source, 0))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or dial.substitute is None:
                raise
            self._exchange.missing_source(dial.source)
            if not self._exchange.serves_every_address(dial.substitute):
                raise OSError(errno.ECONNREFUSED, "listens on a loopback address only") from None
            return dial.substitute
        return dial.destination

    def _on_event(self, mask: int) -> None:
        upstream = self._socket
        assert upstream is not None
        self._deadlines.discard(self)
        code = upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if mask & _FAILED else 0
        if code:
            self._drop()
            self._next(OSError(code, os.strerror(code)))
            return
        self._reached(upstream, mask)

    def _drop(self) -> None:
        """Let go of an attempt."""
        if self._link is not None:
            self._exchange.own_dials.pop(self._link, None)
            self._exchange.hops.forget(self._link)
            self._link = None
        if self._socket is not None:
            self._exchange.loop.hang_up(self._socket)
            self._socket = None
