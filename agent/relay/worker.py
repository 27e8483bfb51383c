"""One worker of the relay: its event loop, its sockets, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from select import EPOLLIN
from typing import TYPE_CHECKING

from agent.relay import routes, sock_diag
from agent.relay.complaints import Complaints
from agent.relay.connection import Context
from agent.relay.dialling import Exchange, Link
from agent.relay.dials import SelfDialGuard
from agent.relay.dns_server import DnsServer
from agent.relay.loop import Loop
from agent.relay.notify import notify, watchdog_interval
from agent.relay.pump import BUFFER_SIZE, PipePool
from agent.relay.route import Route, Surroundings
from agent.relay.settings import ListenerSettings, Role, Settings
from agent.relay.sockets import Place, wanted
from agent.relay.tally import Tally
from agent.relay.tcp import TcpRelay

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

DRAINING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = signal.SIGQUIT
_SIGNALS = (*DRAINING_SIGNALS, AT_ONCE)
_ENDED = OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


class Worker:
    """Serves a share of the sockets until it is told to end.

    SIGTERM and SIGINT drain: nothing new is accepted, and what runs may end by itself for `drain_seconds`. SIGQUIT
    ends everything at once, and so does the end of the supervisor, whose pipe `supervisor` is. A second SIGTERM or
    SIGINT does so only without a supervisor: a terminal or service manager signals every process, so that a worker
    gets one of its own beside the supervisor's.
    """

    def __init__(
        self, settings: Settings, counts: Tally, log: FilteringBoundLogger, supervisor: int | None = None
    ) -> None:
        self._settings = settings
        self._log = log
        self._complaints = Complaints(log)
        self._loop = Loop()
        self._pool = PipePool()
        self._draining = False
        self._supervised = supervisor is not None
        self._guard = SelfDialGuard(frozenset(), routes.is_local)
        own_dials: set[Link] = set()
        exchange = Exchange(self._loop, own_dials, self._missing_source, sock_diag.serves_every_address)
        context = Context(exchange, self._pool, memoryview(bytearray(BUFFER_SIZE)))
        self._tcp = TcpRelay(context, counts, log)
        self._dns = DnsServer(self._loop, settings.dns, self._guard, log)
        self._surroundings = Surroundings(self._guard, own_dials, self._dns.upstreams, routes.is_local)
        self._sockets: dict[Place, Sequence[socket.socket]] = {}
        if supervisor is not None:
            self._loop.watch(supervisor, EPOLLIN, lambda _mask: self._end("the supervisor has gone"))

    def use(self, settings: Settings, sockets: Mapping[Place, Sequence[socket.socket]]) -> None:
        """Serve these sockets by these settings; connections that exist go on as they began."""
        self._settings = settings
        self._guard.watch(listener.listen for listener in settings.listeners)
        self._dns.use(settings.dns)
        streams = [listener for listener in settings.listeners if listener.role is not Role.DNS]
        self._tcp.use(
            {listener.name: Route(listener, slot, self._surroundings) for slot, listener in enumerate(streams)},
            settings.limits,
            access_log=settings.access_log,
        )
        for listener, place in wanted(settings):
            for sock in sockets[place]:
                self._listen(listener, sock)
        self._sockets = dict(sockets)

    def _listen(self, listener: ListenerSettings, sock: socket.socket) -> None:
        if listener.role is Role.DNS:
            self._dns.listen(sock, listener.access.admits)
        else:
            self._tcp.acceptor.listen(sock, listener.name)

    def run(self, handlers: Mapping[int, Callable[[], None]] | None = None) -> None:
        """Serve; returns when everything has ended. `handlers` are for further signals, by their number."""
        handlers = handlers or {}
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._loop.watch(reader.fileno(), EPOLLIN, partial(self._on_signals, reader, handlers))
        # The handlers do nothing: a signal may come between any two instructions, so the loop reads it from the
        # socket when it is ready for it.
        for number in (*_SIGNALS, *handlers):
            signal.signal(number, lambda _number, _frame: None)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_SIGNALS, *handlers))
        interval = None if self._supervised else watchdog_interval()
        if interval:
            self._show_life(interval)
        try:
            self._loop.run()
        finally:
            signal.set_wakeup_fd(previous)
            self._loop.release()
            self._pool.close()
            reader.close()
            writer.close()

    def _show_life(self, interval: float) -> None:
        """Tell the watchdog that the loop turns, again and again."""
        notify("WATCHDOG=1")
        self._loop.later(interval, partial(self._show_life, interval))

    def _missing_source(self, source: str) -> None:
        self._complaints.warn(
            "an address the relay dials applications from is missing, so it dials them on the loopback address; "
            "those that listen on another address only are not reached (tpctl install adds it to lo)",
            address=source,
            pid=os.getpid(),
        )

    def _on_signals(self, reader: socket.socket, handlers: Mapping[int, Callable[[], None]], _mask: int) -> None:
        for number in reader.recv(4096):
            name = signal.Signals(number).name
            if number in handlers:
                handlers[number]()
            elif number == AT_ONCE:
                self._end(name)
            elif number in DRAINING_SIGNALS and not self._draining:
                self.drain(name)
            elif number in DRAINING_SIGNALS and not self._supervised:
                self._end(f"a second signal, {name}")

    def drain(self, why: str) -> None:
        """Accept nothing new, and end with the last connection or when the drain timeout has passed."""
        self._draining = True
        notify("STOPPING=1")
        self._tcp.acceptor.drain()
        self._dns.drain(self._stop_when_idle)
        self._log.info(
            "draining",
            reason=why,
            connections=self._tcp.busy,
            queries=self._dns.busy,
            seconds=self._settings.drain_seconds,
        )
        self._tcp.idle = self._stop_when_idle
        self._loop.later(self._settings.drain_seconds, lambda: self._end("the drain timeout has passed"))
        self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        if not self._tcp.busy and not self._dns.busy:
            self._loop.stop()

    def _end(self, why: str) -> None:
        if self._tcp.busy or self._dns.busy:
            self._log.warning("ending what still runs", reason=why, connections=self._tcp.busy, queries=self._dns.busy)
        self._loop.stop()
        self._tcp.acceptor.drain()
        self._tcp.reset(_ENDED)
        self._dns.reset()
