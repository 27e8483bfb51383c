"""The TCP side of one worker: from an accepted socket to a connection that is relayed, and to its end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tpctl.host import conntrack
from tpctl.relay.connections import tally
from tpctl.relay.connections.acceptor import LIMIT_REACHED, OUT_OF_ROOM, Acceptor
from tpctl.relay.connections.clients import Client, total
from tpctl.relay.connections.connection import RESET_ON_CLOSE, Connection
from tpctl.relay.connections.dialling import Dialling
from tpctl.relay.connections.dials import Dial
from tpctl.relay.connections.handshake import Handshake
from tpctl.relay.connections.plan import Context, Plan, UpstreamTls
from tpctl.relay.connections.proxy_protocol import announce
from tpctl.relay.connections.quick import QuickConnection
from tpctl.relay.connections.reception import Guest, Reception, told
from tpctl.relay.connections.route import Refusal, Route
from tpctl.relay.connections.states import Ending
from tpctl.relay.connections.tally import Tally
from tpctl.relay.loop.arrival import is_from_this_host
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.descriptors import A_CONNECTION, INBOUND, OUTBOUND, OUTBOUND_OF_OTHERS
from tpctl.relay.loop.loop import Timer, shrink
from tpctl.relay.loop.memory import Memory
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.loop.shares import Shares
from tpctl.relay.settings.listen import PROBES, Keepalive, keepalive_within
from tpctl.relay.settings.model import Limits, Role

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_ATTEMPT_SECONDS = 3.0
"""For one of several upstreams of a virtual address, so that the next one has its turn."""
_USES = {Role.INBOUND: INBOUND, Role.OUTBOUND: OUTBOUND}
_CHECKS = 8
"""Quiet connections are looked for this often during the shortest time they are allowed."""


class TcpRelay:
    """Relays the connections of one worker."""

    def __init__(self, context: Context, counts: Tally, log: FilteringBoundLogger, room: Shares) -> None:
        """`room` are the descriptors."""
        self._context = context
        self._room = room
        self._loop = context.exchange.loop
        self._counts = counts
        self._log = log
        self._complaints = Complaints(log)
        self._access_log = False
        self._limit = 0
        self._routes: dict[str, Route] = {}
        self._dialling: dict[float, Deadlines[Dialling]] = {}
        self._shaking: dict[float, Deadlines[Handshake]] = {}
        self._connections: dict[Connection, Guest] = {}
        self._check_seconds = 0.0
        self._keepalive: Keepalive | None = None
        self._check: Timer | None = None
        self._reception = Reception(self._loop, self._judge, self._admit, self._refuse)
        self.acceptor = Acceptor(self._loop, self._complaints, self._on_accepted, self._is_full)
        self.acceptor.paused = partial(counts.add, tally.WORKER, tally.PAUSES)
        self.idle: Callable[[], None] | None = None
        """Called whenever the last connection has ended."""
        self._memory = Memory(self._loop, lambda: self.busy, self._let_go)

    @property
    def busy(self) -> int:
        """How many connections there are."""
        return len(self._connections) + self._reception.busy

    def use(self, routes: Mapping[str, Route], limits: Limits, *, access_log: bool) -> None:
        """Treat new connections so from now on; `routes` are by the name of the listener."""
        self._routes = dict(routes)
        self._limit = limits.connections
        self._access_log = access_log
        for seconds in (_ATTEMPT_SECONDS, *(route.settings.timeouts.connect for route in routes.values())):
            if seconds not in self._dialling:
                self._dialling[seconds] = Deadlines[Dialling](self._loop, seconds, Dialling.expire)
                self._shaking[seconds] = Deadlines[Handshake](self._loop, seconds, Handshake.expire)
        timeouts = [route.settings.timeouts for route in routes.values()]
        times = [seconds for one in timeouts for seconds in (one.idle, one.half_closed) if seconds]
        silence = max(conntrack.half_closed_seconds(), PROBES)
        self._keepalive = keepalive_within(silence)
        seconds = min([silence / PROBES, *(seconds / _CHECKS for seconds in times)])
        # Those that exist keep their times.
        self._check_seconds = min(seconds, self._check_seconds) if self.busy else seconds
        if self._check is not None:
            self._check.cancel()
            self._check = None
        self._check_later()

    def reset(self, error: OSError) -> None:
        """Break every connection off."""
        self._reception.reset(error)
        for connection in tuple(self._connections):
            connection.reset(error)

    def _is_full(self, listener: str) -> str | None:
        """Why no further connection may be accepted on a listener."""
        if self._limit and self._counts.total(tally.WORKER, tally.ACTIVE) >= self._limit:
            return LIMIT_REACHED
        route = self._routes[listener]
        limit = route.settings.limits.connections
        if limit and self._counts.total(route.slot, tally.ACTIVE) >= limit:
            return LIMIT_REACHED
        return None if self._room.has_room(_USES[route.settings.role], A_CONNECTION) else OUT_OF_ROOM

    def _on_accepted(self, client: Socket, name: Any, listener: str) -> None:
        route = self._routes[listener]
        self._counts.add(route.slot, tally.ACCEPTED)
        guest = Guest.accepted(client, name, route)
        use = INBOUND
        if route.settings.role is Role.OUTBOUND:
            use = OUTBOUND if is_from_this_host(client, name) else OUTBOUND_OF_OTHERS
        if self._room.take(use, A_CONNECTION):
            guest.use = use
        self._counts.add(route.slot, tally.ACTIVE)
        self._counts.add(tally.WORKER, tally.ACTIVE)
        if guest.use is None:
            self._refuse(guest, Refusal.NO_ROOM)
            return
        try:
            self._reception.receive(guest)
        except OSError as error:
            self._refuse(guest, Refusal.GONE, error.strerror)
        except Exception as error:  # noqa: BLE001 - contained
            self._loop.contain(error, partial(self._reception.receive, guest))

    def _judge(self, guest: Guest) -> Refusal | None:
        """Why a client is refused; None when it is decided what to dial for it."""
        route = guest.route
        dials = route.decide(guest.peer, guest.destination, sender=guest.sender, translated=guest.is_translated)
        if not isinstance(dials, Refusal):
            dials = route.counting_hops(guest.hops, dials)
        if isinstance(dials, Refusal):
            return dials
        guest.dials = dials
        limit = route.settings.limits.connections_per_source
        if limit and guest.peer.host is not None:
            if self._counts.connections_of(route.slot, guest.peer.host) >= limit:
                return Refusal.TOO_MANY
            guest.counted = guest.peer.host
            self._counts.enter(route.slot, guest.peer.host)
        return None

    def _admit(self, guest: Guest) -> None:
        """Dial for a client."""
        if guest.again is not None:
            self._counts.add(guest.route.slot, tally.BROUGHT_BACK)
            self._relay(guest, (guest.again,))
        else:
            self._relay(guest, guest.dials)

    def _relay(self, guest: Guest, dials: Sequence[Dial]) -> None:
        timeouts = guest.route.settings.timeouts
        half_closed = timeouts.idle if timeouts.half_closed is None else timeouts.half_closed
        patience = timeouts.connect
        if len(dials) > 1:
            patience = min(patience or _ATTEMPT_SECONDS, _ATTEMPT_SECONDS)
        tls = guest.route.tls.upstream if guest.again is None else None
        asked = guest.route.settings.listen.keepalive
        plan = Plan(
            dials,
            self._dialling[patience],
            timeouts.idle,
            half_closed,
            self._keepalive if asked is None or asked.on else None,
            header=_header(guest),
            client=guest.end,
            upstream_tls=UpstreamTls(tls, self._shaking[timeouts.connect]) if tls is not None else None,
            reached=partial(self._on_reached, guest.route.slot, time.monotonic()),
        )
        is_plain = plan.client is None and tls is None and guest.socket.family != socket.AF_UNIX
        kind = QuickConnection if is_plain else Connection
        connection = kind(self._context, guest.socket, plan, partial(self._on_end, guest))
        self._connections[connection] = guest
        if self._check is None:
            self._check_later()
        try:
            connection.start()
        except OSError as error:
            connection.reset(error, Ending.NOT_REACHED)
        except Exception as error:  # noqa: BLE001 - contained
            self._loop.contain(error, connection.start)

    def _refuse(self, guest: Guest, why: Refusal, reason: str | None = None) -> None:
        if guest.gone:
            return
        if guest.socket.family != socket.AF_UNIX:
            guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._loop.hang_up(guest.socket)
        self._counts.add(guest.route.slot, tally.REFUSED[why])
        name, client, destination = guest.route.settings.name, str(guest.peer), str(guest.destination)
        self._complaints.warn(why, listener=name, client=client, destination=destination, reason=reason)
        if self._access_log:
            self._write(guest, str(why), upstream=None, error=reason)
        self._left(guest)

    def _check_later(self) -> None:
        """Look for connections on which nothing moves, as long as there are any."""
        if self._connections:
            self._check = self._loop.later(self._check_seconds, self._check_quiet)

    def _check_quiet(self) -> None:
        now = time.monotonic()
        self._check = None
        for connection in tuple(self._connections):
            try:
                connection.check_quiet(now)
            except Exception as error:  # noqa: BLE001 - contained
                self._loop.contain(error, connection.check_quiet)
        self._check_later()

    def _on_reached(self, slot: int, began: float, now: float) -> None:
        self._counts.observe(slot, tally.CONNECT, now - began)

    def _on_end(self, guest: Guest, connection: Connection) -> None:
        self._connections.pop(connection, None)
        try:
            self._counts.add(guest.route.slot, tally.ENDED[connection.ending])
            self._counts.observe(guest.route.slot, tally.LENGTH, time.monotonic() - guest.since)
            self._count_bytes(guest, connection)
            if self._access_log:
                error = told(connection.error) if connection.error else None
                upstream = str(connection.upstream)
                self._write(guest, str(connection.ending), upstream=upstream, error=error)
        finally:
            self._left(guest)

    def count_bytes(self) -> None:
        """Count what has moved on the connections that exist."""
        for connection, guest in self._connections.items():
            self._count_bytes(guest, connection)

    def clients(self) -> dict[str, Client]:
        """Whose connections there are, with the bytes that have been counted."""
        return total((str(guest.peer), (1, *guest.moved)) for guest in self._connections.values())

    def _count_bytes(self, guest: Guest, connection: Connection) -> None:
        moved = connection.moved
        if moved != guest.moved:
            self._counts.add(guest.route.slot, tally.SENT, moved[0] - guest.moved[0])
            self._counts.add(guest.route.slot, tally.RECEIVED, moved[1] - guest.moved[1])
            guest.moved = moved

    def _left(self, guest: Guest) -> None:
        if guest.gone:
            return
        guest.gone = True
        if guest.use is not None:
            self._room.give(guest.use, A_CONNECTION)
        self._counts.add(guest.route.slot, tally.ACTIVE, -1)
        self._counts.add(tally.WORKER, tally.ACTIVE, -1)
        if guest.counted is not None:
            self._counts.leave(guest.route.slot, guest.counted)
        self._memory.ended()
        if self.idle is not None and not self.busy:
            self.idle()

    def _let_go(self) -> None:
        """Drop what is only kept for later connections."""
        self._context.pool.close()
        shrink(self._connections)
        shrink(self._context.exchange.own_dials)
        self._loop.let_go()

    def _write(
        self,
        guest: Guest,
        reason: str,
        *,
        upstream: str | None,
        error: str | None = None,
    ) -> None:
        """A line of the access log."""
        self._log.info(
            "connection",
            listener=guest.route.settings.name,
            role=str(guest.route.settings.role),
            client=str(guest.peer),
            destination=str(guest.destination),
            upstream=upstream,
            sent=guest.moved[0],
            received=guest.moved[1],
            seconds=round(time.monotonic() - guest.since, 6),
            reason=reason,
            hops=guest.again.hops if guest.again else 0,
            error=error,
        )


def _header(guest: Guest) -> bytes:
    """What the upstream is told of the client, if the listener tells it anything."""
    version = guest.route.settings.send_proxy_protocol
    if version is None or guest.again is not None:
        return b""
    host, port = guest.peer
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    source = Destination(host, port, family) if host is not None else None
    return announce(guest.header, version, source, guest.destination)
