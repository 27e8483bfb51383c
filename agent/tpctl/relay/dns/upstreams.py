"""Which name servers a query is sent to, in which order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tpctl.relay.connections import dials
from tpctl.relay.connections.dials import SelfDialGuard
from tpctl.relay.dns.resolvers import ResolvConf, Resolvers
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.original_destination import Destination

MAX_TRIES = 12
"""However many servers and attempts a resolv.conf has, a query ends some time."""
AVOID_SECONDS = 30.0
"""How long a server that did not answer is asked last. Then one query finds out whether it answers again."""


class Plan(NamedTuple):
    """How one query is asked."""

    servers: tuple[Destination, ...]
    """One for each try. Empty when there is nobody to ask."""
    distinct: int
    """So many of them, from the first, are different servers."""
    timeout_seconds: float
    """How long each of them may take."""


class Upstreams:
    """The name servers of a resolv.conf, and which of them did not answer lately, over one transport."""

    def __init__(
        self,
        resolv_conf: ResolvConf,
        guard: SelfDialGuard,
        complaints: Complaints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolv_conf = resolv_conf
        self._guard = guard
        self._complaints = complaints
        self._clock = clock
        self._known: Resolvers | None = None
        self._complete = False
        self._servers: tuple[Destination, ...] = ()
        self._avoided: dict[Destination, float] = {}
        self._turn = 0
        self._usual: Plan | None = None
        """What to do as long as every server answers."""

    def use(self, resolv_conf: ResolvConf) -> None:
        """Ask the servers of this file from now on, and look anew which of them are the relay itself."""
        self._resolv_conf = resolv_conf
        self._known = None

    def plan(self) -> Plan:
        """What to do with the next query."""
        resolvers = self._resolv_conf.current()
        if resolvers is not self._known:
            self._known = resolvers
            self._avoided.clear()
            self._complete = False
        if not self._complete:
            self._resolve(resolvers)
        servers = self._servers
        if not self._avoided and not resolvers.rotate and self._usual is not None:
            return self._usual
        if resolvers.rotate and len(servers) > 1:
            self._turn = (self._turn + 1) % len(servers)
            servers = servers[self._turn :] + servers[: self._turn]
        if self._avoided:
            servers = self._best_first(servers)
        plan = Plan((servers * resolvers.attempts)[:MAX_TRIES], len(servers), resolvers.timeout_seconds)
        if not self._avoided:
            self._usual = plan
        return plan

    def failed(self, server: Destination) -> None:
        """A server did not answer in time, or cannot be reached."""
        self._avoided[server] = self._clock() + AVOID_SECONDS

    def answered(self, server: Destination) -> None:
        """A server answered."""
        if self._avoided:
            self._avoided.pop(server, None)

    def _best_first(self, servers: tuple[Destination, ...]) -> tuple[Destination, ...]:
        now = self._clock()
        avoided = []
        for server in servers:
            until = self._avoided.get(server)
            if until is None:
                continue
            if until > now:
                avoided.append(server)
            else:
                # This query tries it; the others need not wait for what it finds out.
                self._avoided[server] = now + AVOID_SECONDS
        return (*(server for server in servers if server not in avoided), *avoided)

    def _resolve(self, resolvers: Resolvers) -> None:
        servers = []
        self._complete = True
        for server in resolvers.servers:
            try:
                servers.append(dials.name_server(server))
            except OSError:
                self._complaints.warn("a name server's interface does not exist", server=str(server))
                self._complete = False  # it may come up any moment
        self._servers = self._guard.others(servers)
        self._usual = None
