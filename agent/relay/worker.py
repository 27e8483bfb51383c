"""One worker of the relay: its event loop, its listeners, and how it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from functools import partial
from select import EPOLLIN
from typing import TYPE_CHECKING

from agent.relay import routes
from agent.relay.complaints import Complaints
from agent.relay.connection import Context
from agent.relay.dials import Role, SelfDialGuard
from agent.relay.dns_server import DnsServer
from agent.relay.dns_settings import DnsSettings
from agent.relay.listeners import Listeners
from agent.relay.loop import Loop
from agent.relay.notify import notify, watchdog_interval
from agent.relay.pump import BUFFER_SIZE, PipePool
from agent.relay.settings import Settings
from agent.relay.tcp import TcpRelay

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

DRAINING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = signal.SIGQUIT


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the administrator does: a relayed connection needs two, and bulk ones more."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Worker:
    """Serves one set of listeners until it is told to end.

    SIGTERM and SIGINT drain: nothing new is accepted, and what runs may end by itself for `drain_seconds`. SIGQUIT
    ends everything at once, and so does the end of the supervisor, whose pipe `supervisor` is. A second SIGTERM or
    SIGINT does so only without a supervisor: a terminal or service manager signals every process, so that a worker
    gets one of its own beside the supervisor's.
    """

    def __init__(
        self, settings: Settings, listeners: Listeners, log: FilteringBoundLogger, supervisor: int | None = None
    ) -> None:
        self._settings = settings
        self._log = log
        self._complaints = Complaints(log)
        self._loop = Loop()
        self._pool = PipePool()
        self._draining = False
        self._supervised = supervisor is not None
        guard = SelfDialGuard(settings.ports, routes.is_local)
        buffer = memoryview(bytearray(BUFFER_SIZE))
        context = Context(self._loop, self._pool, buffer, set(), self._missing_source)
        self._dns = DnsServer(self._loop, DnsSettings(resolv_conf=settings.resolv_conf), guard, log)
        self._tcp = TcpRelay(context, guard, self._dns.upstreams, log, access_log=settings.access_log)
        self._tcp.listen(listeners.inbound, Role.INBOUND)
        self._tcp.listen(listeners.outbound, Role.OUTBOUND)
        self._dns.listen(listeners.dns_tcp)
        self._dns.listen(listeners.dns_udp)
        if supervisor is not None:
            self._loop.watch(supervisor, EPOLLIN, lambda _mask: self._end("the supervisor has gone"))

    def run(self) -> None:
        """Serve; returns when everything has ended."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._loop.watch(reader.fileno(), EPOLLIN, partial(self._on_signals, reader))
        # The handlers do nothing: a signal may come between any two instructions, so the loop reads it from the
        # socket when it is ready for it.
        for number in (*DRAINING_SIGNALS, AT_ONCE):
            signal.signal(number, lambda _number, _frame: None)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*DRAINING_SIGNALS, AT_ONCE))
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

    def _on_signals(self, reader: socket.socket, _mask: int) -> None:
        for number in reader.recv(4096):
            name = signal.Signals(number).name
            if number == AT_ONCE:
                self._end(name)
            elif number in DRAINING_SIGNALS and not self._draining:
                self._drain(name)
            elif number in DRAINING_SIGNALS and not self._supervised:
                self._end(f"a second signal, {name}")

    def _drain(self, why: str) -> None:
        self._draining = True
        notify("STOPPING=1")
        self._tcp.drain()
        self._dns.drain(idle=self._stop_when_idle)
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
        self._tcp.drain()
        self._tcp.reset()
        self._dns.reset()
