"""One worker of the relay: its event loop, its sockets, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from select import EPOLLIN
from typing import TYPE_CHECKING

from tpctl.relay.connections import routes, tally, tls
from tpctl.relay.connections.acceleration import Accelerator
from tpctl.relay.connections.dialling import Exchange, OwnDial
from tpctl.relay.connections.dials import SelfDialGuard
from tpctl.relay.connections.held_ports import HeldPorts
from tpctl.relay.connections.hops import Link
from tpctl.relay.connections.plan import Context
from tpctl.relay.connections.pump import BUFFER_SIZE, PipePool
from tpctl.relay.connections.route import Route, Surroundings
from tpctl.relay.connections.sockmap import Sockmap
from tpctl.relay.connections.tally import Tally
from tpctl.relay.connections.tcp import TcpRelay
from tpctl.relay.dns.server import DnsServer
from tpctl.relay.figures.metrics import DNS_COUNTERS, render
from tpctl.relay.figures.metrics_server import MetricsServer, Probes
from tpctl.relay.loop import signals, sock_diag
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.descriptors import budget
from tpctl.relay.loop.failures import Failures
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process.channel import answer, receive
from tpctl.relay.process.notify import WATCHDOG, notify
from tpctl.relay.process.privileges import reserved_descriptors
from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import wanted
from tpctl.relay.settings.access import EVERYBODY
from tpctl.relay.settings.model import ListenerSettings, Role, Settings
from tpctl.system.errors import TpctlError
from tpctl.system.log import dropped

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

DRAINING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = signal.SIGQUIT
ENDING_SIGNALS = (*DRAINING_SIGNALS, AT_ONCE)
_PUBLISH_SECONDS = 2.0
_SILENCE_SECONDS = 10.0
"""A worker shows every two seconds that it lives; the supervisor ends one that does not, a while later."""
_ENDED = OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


class Worker:
    """Serves a share of the sockets until it is told to end.

    SIGTERM and SIGINT drain: nothing new is accepted, and what runs may end by itself for `drain_seconds`. SIGQUIT
    ends everything at once, and so does the end of the supervisor, whose channel `supervisor` is. A second SIGTERM or
    SIGINT does so only without a supervisor: a terminal or service manager signals every process, so that a worker
    gets one of its own beside the supervisor's.
    """

    def __init__(
        self,
        settings: Settings,
        counts: Tally,
        log: FilteringBoundLogger,
        supervisor: socket.socket | None = None,
        sockmap: Sockmap | None = None,
    ) -> None:
        self._running: Running | None = None
        self._log = log
        self._complaints = Complaints(log)
        self.loop = Loop(Failures(log, partial(counts.add, tally.WORKER, tally.FAILURES)))
        room = budget()
        self._pool = PipePool(descriptors=room)
        self._draining = False
        self._supervised = supervisor is not None
        self._guard = SelfDialGuard(frozenset(), routes.is_local)
        own_dials: dict[Link, OwnDial] = {}
        exchange = Exchange(
            self.loop,
            own_dials,
            counts.hops,
            HeldPorts(self.loop, room),
            self._missing_source,
            sock_diag.serves_every_address,
        )
        buffer = memoryview(bytearray(BUFFER_SIZE))
        self._accelerator = Accelerator(self.loop, sockmap, buffer) if sockmap is not None else None
        context = Context(exchange, self._pool, buffer, self._accelerator)
        self._tcp = TcpRelay(context, counts, log, room)
        self._counts = counts
        self._metrics = MetricsServer(self.loop, self._complaints, self._figures, self._probes())
        self._publishing = False
        self._dns = DnsServer(self.loop, settings.dns, self._guard, log, room)
        self._surroundings = Surroundings(
            self._guard, own_dials, counts.hops, self._dns.upstreams, routes.is_local, routes.is_surely_local
        )
        self._sockets: dict[socket.socket, Role] = {}
        if supervisor is not None:
            supervisor.setblocking(False)
            self.loop.watch(supervisor.fileno(), EPOLLIN, partial(self._on_supervisor, supervisor))

    @property
    def is_draining(self) -> bool:
        """Whether it accepts nothing any more."""
        return self._draining

    def use(self, running: Running) -> None:
        """Serve these sockets by these settings; connections that exist go on as they began."""
        settings = running.settings
        contexts = tls.load(settings)
        self._guard.watch(listener.listen for listener in settings.served)
        self._dns.use(settings.dns)
        streams = [one for one in settings.listeners if one.role is not Role.DNS]
        routes = {
            one.name: Route(one, running.slots[one.name], self._surroundings, contexts[one.name]) for one in streams
        }
        self._tcp.use(routes, settings.limits, access_log=settings.access_log)
        sockets: dict[socket.socket, Role] = {}
        for listener, place in wanted(settings):
            for sock in running.sockets[place]:
                sockets[sock] = listener.role
                self._listen(listener, sock)
        for sock, role in self._sockets.items():
            if sock not in sockets:
                self._leave(role, sock)
        self._sockets = sockets
        self._running = running

    def _listen(self, listener: ListenerSettings, sock: socket.socket) -> None:
        if listener.role is Role.DNS:
            self._dns.listen(sock, None if listener.access == EVERYBODY else listener.access.admits)
        elif listener.role is Role.METRICS:
            self._metrics.listen(sock)
            if not self._publishing:
                self._publish()
        else:
            self._tcp.acceptor.listen(sock, listener.name)

    def _leave(self, role: Role, sock: socket.socket) -> None:
        if role is Role.DNS:
            self._dns.leave(sock)
        elif role is Role.METRICS:
            self._metrics.leave(sock)
        else:
            self._tcp.acceptor.leave(sock)

    def run(self, handlers: Mapping[int, Callable[[], None]], beat: float | None = None) -> None:
        """Serve; returns when everything has ended.

        `handlers` are for further signals, or other ones, by their number. `beat` is how often, in seconds, it is to
        show that it lives.
        """
        own = {number: partial(self.end, number) for number in ENDING_SIGNALS}
        if beat:
            self._show_life()
            self.loop.every(beat, self._show_life)
        try:
            with signals.handled(self.loop, own | dict(handlers)):
                self.loop.run()
        finally:
            self._counts.rest()
            self.loop.release()
            self._pool.close()

    def _probes(self) -> Probes:
        return {b"/healthz": self._ailing, b"/ready": self._not_ready}

    def _ailing(self) -> str | None:
        """Why the relay is not alive; this worker is, or nobody would ask."""
        silence = self._counts.silence()
        return f"a worker has been silent for {silence:.0f} s" if silence > _SILENCE_SECONDS else None

    def _not_ready(self) -> str | None:
        """Why the relay does not accept connections."""
        draining = self._counts.total(tally.WORKER, tally.DRAINING)
        if self._running is not None and draining >= self._running.settings.workers:
            return "draining: no connection is accepted any more"
        return self._ailing()

    def _figures(self, with_clients: bool) -> str:
        assert self._running is not None
        if with_clients:
            self._counts.clients.ask()
        self._tell_figures()
        clients = self._counts.clients.told() if with_clients else {}
        return render(self._counts, self._running.slots, self._running.settings, clients)

    def _publish(self) -> None:
        """Bring the counters that all workers share up to date, again and again, once somebody wants to read them."""
        self._publishing = True
        self._tell_figures()
        self.loop.every(_PUBLISH_SECONDS, self._tell_figures)

    def _tell_figures(self) -> None:
        self._tcp.count_bytes()
        if self._counts.clients.are_asked_for():
            self._counts.clients.tell(self._tcp.clients())
        if self._accelerator is not None:
            self._counts.count(tally.ACCELERATED, self._accelerator.begun)
            self._counts.count(tally.TAKEN_BACK, self._accelerator.over)
        self._counts.count(tally.DROPPED_LINES, dropped())
        for number, name in enumerate(DNS_COUNTERS):
            self._counts.count(tally.DNS + number, getattr(self._dns.counters, name))

    def _on_supervisor(self, channel: socket.socket, _mask: int) -> None:
        """Another state, or the supervisor's end."""
        try:
            self._take(channel)
        finally:
            self.loop.afterwards(partial(answer, channel))  # when the sockets that it has left are closed

    def _take(self, channel: socket.socket) -> None:
        """Do as the supervisor says, or as before if that cannot be."""
        assert self._running is not None
        running = None
        try:
            with reserved_descriptors():
                running = receive(channel, self._running.sockets)
                if running is None:
                    self.loop.forget(channel.fileno())
                    self._end("the supervisor has gone")
                    return
                self.use(running)
        except (TpctlError, OSError) as error:  # the supervisor has checked it; a file may have changed since
            self._log.error("a worker keeps its old configuration", pid=os.getpid(), reason=str(error))
            if running is not None:  # the sockets come once, and what follows may want them
                self._running = replace(self._running, sockets=running.sockets | self._running.sockets)

    def _show_life(self) -> None:
        """Tell the watchdog, or the supervisor, that the loop turns."""
        notify(WATCHDOG)
        self._counts.beat()

    def _missing_source(self, source: str) -> None:
        self._complaints.warn(
            "an address that the relay dials applications from is missing, so it dials them on the loopback address; "
            "those that listen only on another address are not reached (tpctl install adds it to lo)",
            address=source,
            pid=os.getpid(),
        )

    def end(self, number: int) -> None:
        """Do what an ending signal asks for."""
        name = signal.Signals(number).name
        if number == AT_ONCE:
            self._end(name)
        elif not self._draining:
            notify("STOPPING=1")
            self.drain(name)
        elif not self._supervised:
            self._end(f"a second signal, {name}")

    def drain(self, why: str, *, handed_over: bool = False) -> None:
        """Accept nothing new, and end with the last connection or when the drain timeout has passed.

        What waits in the sockets is accepted first, unless they are `handed_over` to another process.
        """
        assert self._running is not None
        drain_seconds = self._running.settings.drain_seconds
        self._draining = True
        self._counts.put(tally.WORKER, tally.DRAINING, 1)
        if handed_over:
            self._metrics.drain(self._stop_when_idle)
            self._tcp.acceptor.stop()
        else:
            self._tcp.acceptor.drain()
        self._dns.drain(self._stop_when_idle, leave_waiting=handed_over)
        # Whoever reads the line may connect at once, and is to be refused: the listeners are closed by then.
        self.loop.afterwards(
            partial(
                self._log.info,
                "draining",
                reason=why,
                connections=self._tcp.busy,
                queries=self._dns.busy,
                seconds=drain_seconds,
            )
        )
        self._tcp.idle = self._stop_when_idle
        self.loop.later(drain_seconds, lambda: self._end("the drain timeout has passed"))
        self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        if not self._tcp.busy and not self._dns.busy and not self._metrics.busy:
            self.loop.stop()

    def _end(self, why: str) -> None:
        if self._tcp.busy or self._dns.busy:
            self._log.warning(
                "ending what is still running", reason=why, connections=self._tcp.busy, queries=self._dns.busy
            )
        self.loop.stop()
        self._metrics.stop()
        self._tcp.acceptor.stop()  # somebody else may have the sockets, and serve what waits in them
        self._tcp.reset(_ENDED)
        self._dns.reset()
