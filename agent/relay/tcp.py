"""The TCP side of one worker: from an accepted socket to a connection that is relayed, and to its end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.relay.acceptor import Acceptor
from agent.relay.complaints import Complaints
from agent.relay.connection import RESET_ON_CLOSE, Connection, Context, Ending, Plan
from agent.relay.deadlines import Deadlines
from agent.relay.dialling import Dialling
from agent.relay.original_destination import Destination, recover, unmapped
from agent.relay.route import Peer, Refusal, Route

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_ATTEMPT_SECONDS = 3.0
"""For one of several upstreams of a virtual address, so that the next one has its turn."""
_LONGEST_CHECK = 30.0
_CHECKS = 8
"""Quiet connections are looked for this often during the shortest time they are allowed."""
_UNKNOWN = Destination("0.0.0.0", 0)
"""The original destination of what came to a unix socket."""


class TcpRelay:
    """Relays the connections of one worker."""

    def __init__(self, context: Context, log: FilteringBoundLogger, *, access_log: bool = False) -> None:
        self._context = context
        self._loop = context.exchange.loop
        self._log = log
        self._complaints = Complaints(log)
        self._access_log = access_log
        self._routes: dict[str, Route] = {}
        self._dialling: dict[float, Deadlines[Dialling]] = {}
        self._connections: set[Connection] = set()
        self._checking = False
        self.acceptor = Acceptor(self._loop, self._complaints, self._on_accepted, lambda: False)
        self.idle: Callable[[], None] | None = None
        """Called whenever the last connection has ended."""

    @property
    def busy(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def use(self, routes: Mapping[str, Route], *, access_log: bool) -> None:
        """Treat new connections so from now on; `routes` are by the name of the listener."""
        self._routes = dict(routes)
        self._access_log = access_log
        times = {route.settings.timeouts.connect for route in routes.values()} | {_ATTEMPT_SECONDS}
        kept = {seconds: queue for seconds, queue in self._dialling.items() if seconds in times}
        self._dialling = kept | {
            seconds: Deadlines[Dialling](self._loop, seconds, Dialling.expire) for seconds in times - kept.keys()
        }
        if not self._checking:
            self._check_quiet()

    def reset(self, error: OSError) -> None:
        """Break every connection off."""
        for connection in tuple(self._connections):
            connection.reset(error)

    def _on_accepted(self, client: socket.socket, name: Any, listener: str) -> None:
        route = self._routes[listener]
        if isinstance(name, tuple):
            peer, destination = Peer(unmapped(name[0]), name[1]), recover(client, name[0])
        else:
            peer, destination = Peer(None, 0), _UNKNOWN
        self._relay(client, route, peer, destination)

    def _relay(self, client: socket.socket, route: Route, peer: Peer, destination: Destination) -> None:
        dials = route.decide(peer, destination)
        if isinstance(dials, Refusal):
            self._refuse(client, route, peer, destination, dials)
            return
        done: Callable[[Connection], None] = self._forget
        if self._access_log:
            done = partial(self._report, route, peer, destination, time.monotonic())
        timeouts = route.settings.timeouts
        half_closed = timeouts.idle if timeouts.half_closed is None else timeouts.half_closed
        patience = _ATTEMPT_SECONDS if len(dials) > 1 else timeouts.connect
        plan = Plan(dials, self._dialling[patience], timeouts.idle, half_closed)
        connection = Connection(self._context, client, plan, done)
        self._connections.add(connection)
        try:
            connection.start()
        except OSError as error:
            connection.reset(error, Ending.NOT_REACHED)

    def _refuse(self, client: socket.socket, route: Route, peer: Peer, destination: Destination, why: Refusal) -> None:
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        client.close()
        name = route.settings.name
        self._complaints.warn(why, listener=name, client=str(peer), destination=str(destination))

    def _check_quiet(self) -> None:
        """Look for connections on which nothing moves; again and again, as long as any timeout asks for it."""
        timeouts = [route.settings.timeouts for route in self._routes.values()]
        times = [seconds for one in timeouts for seconds in (one.idle, one.half_closed) if seconds]
        self._checking = bool(times)
        if not times:
            return
        now = time.monotonic()
        for connection in tuple(self._connections):
            connection.check_quiet(now)
        self._loop.later(min(min(times) / _CHECKS, _LONGEST_CHECK), self._check_quiet)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self.idle is not None:
            self.idle()

    def _report(
        self, route: Route, peer: Peer, destination: Destination, started: float, connection: Connection
    ) -> None:
        sent, received = connection.moved
        self._log.info(
            "connection",
            listener=route.settings.name,
            role=str(route.settings.role),
            client=str(peer),
            destination=str(destination),
            upstream=str(connection.upstream),
            sent=sent,
            received=received,
            seconds=round(time.monotonic() - started, 6),
            reason=str(connection.ending),
            error=connection.error.strerror if connection.error else None,
        )
        self._forget(connection)
