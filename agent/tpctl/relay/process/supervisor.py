"""Starts the relay, alone or with workers, and sees to reloads, restarts and the end.

A single worker is the process itself. Several are its children: they all serve, or none.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tpctl.relay.connections import tally, tls
from tpctl.relay.connections.sockmap import Sockmap
from tpctl.relay.connections.tally import Tally
from tpctl.relay.dns.local import read_zone
from tpctl.relay.loop import failures, signals
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process import activation
from tpctl.relay.process.crew import LOOK_SECONDS
from tpctl.relay.process.handover import Successor, announce_readiness
from tpctl.relay.process.notify import WATCHDOG, notify, reloading, watchdog_interval
from tpctl.relay.process.privileges import raise_descriptor_limit, reserved_descriptors
from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import Sockets
from tpctl.relay.process.worker import ENDING_SIGNALS, Worker
from tpctl.relay.process.workers import HANDLED, RELOAD, RESTART, Workers
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import Settings
from tpctl.system.errors import TpctlError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_COLLECTED_EVERY = 20_000
"""Objects made more than have gone."""


def serve(
    load: Callable[[], Settings], settings: Settings, log: FilteringBoundLogger, sockmap: Sockmap | None = None
) -> int:
    """Run the relay until it is told to end; returns the exit code. `load` reads the configuration again.

    Raises HostError when a socket cannot be opened, InputError when a file of the settings is unusable.
    """
    if os.geteuid() == 0:
        log.warning(
            "running as root: unless the policy's data plane user is root, the relay's own connections are captured"
        )
    # Until there is somebody to handle them: whoever reads in the log that the relay is ready may send one at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    raise_descriptor_limit()
    read_zone(settings.dns)
    tls.load(settings)
    held = activation.match(settings, activation.inherited(), log)
    running = Running.begin(settings, held)
    addresses = {listener.name: show(listener.listen.address) for listener in settings.served}
    log.info("listening", workers=settings.workers, **addresses)
    # The garbage collector never looks at what there is by now, so that workers go on sharing its memory, and seldom at
    # the rest: connections that end leave nothing to it, and those that exist it would look through over and over.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_EVERY)
    kind = Alone if settings.workers == 1 else Supervisor
    return kind(running, load, log, sockmap).run()


class Life:
    """What there is to do in a relay's life, however many workers it has."""

    def __init__(
        self, running: Running, load: Callable[[], Settings], log: FilteringBoundLogger, sockmap: Sockmap | None
    ) -> None:
        self._state = running
        self._sockmap = sockmap
        self._load = load
        self._log = log
        self._counts = Tally(running.settings.workers)
        self._successor: Successor | None = None

    def _is_ending(self) -> bool:
        """Whether the sockets have gone already."""
        raise NotImplementedError

    def _when_used(self, action: Callable[[], None]) -> None:
        """Do something when nobody serves by an older state than the one that was told last."""
        raise NotImplementedError

    def _announce(self) -> None:
        """Tell everybody who waits for it that the relay serves."""
        activation.keep(Settings(), self._state)
        self._log.info("ready", pid=os.getpid())
        notify("READY=1")
        announce_readiness()

    def _reload(self, use: Callable[[Running, Sockets], None]) -> None:
        """Read the configuration again, and use it if it is in order. What is not leaves everything as it was."""
        if self._is_ending():
            return
        reloading()
        is_used = False
        try:
            with reserved_descriptors():
                running, added = self._state.renewed(self._load())
                read_zone(running.settings.dns)
                tls.load(running.settings)
                use(running, added)
        except (TpctlError, OSError) as error:
            self._counts.add(tally.WORKER, tally.FAILED_RELOADS)
            self._log.error("the configuration is invalid, the old one stays", problems=str(error).splitlines())
        else:
            self._remember(running)
            self._when_used(partial(self._reloaded, running.settings))
            is_used = True
        finally:
            if not is_used:
                notify("READY=1")

    def _reloaded(self, settings: Settings) -> None:
        """Tell everybody who waits for it."""
        self._counts.add(tally.WORKER, tally.RELOADS)
        self._log.info("the configuration was reloaded", listeners=[one.name for one in settings.served])
        if not self._is_ending():
            notify("READY=1")

    def _remember(self, running: Running) -> None:
        """Go on with another state; the service manager keeps other sockets from now on."""
        activation.keep(self._state.settings, running)
        self._state = running

    def _give_up_restart(self) -> None:
        """Whoever ends the relay means the successor too, which nobody knows yet."""
        if self._successor is not None:
            self._successor.stop()

    def _restart(self, loop: Loop, go: Callable[[], None]) -> None:
        """Start a successor with the sockets; `go` when it serves. If it does not, everything stays as it was."""
        if self._is_ending():
            return
        if self._successor is not None:
            self._log.warning("a restart is already under way")
            return

        def ended(pid: int | None, reason: str) -> None:
            self._successor = None
            if self._is_ending():
                return
            if pid is None:
                self._log.error("the restart has failed, this process continues", reason=reason)
                return
            self._log.info("handed over", successor=pid)
            notify(f"MAINPID={pid}")
            go()

        sockets = activation.names_of(self._state.settings, self._state.sockets)
        try:
            with reserved_descriptors():
                self._successor = Successor(loop, sockets, ended, self._sockmap)
        except OSError as error:
            self._log.error("the restart has failed, this process continues", reason=error.strerror)


class Alone(Life):
    """A relay whose only worker is this process."""

    def run(self) -> int:
        """Serve until told to end."""
        worker = self._worker = Worker(self._state.settings, self._counts, self._log, sockmap=self._sockmap)
        worker.use(self._state)
        self._announce()
        handlers: dict[int, Callable[[], None]] = {number: partial(self._end, number) for number in ENDING_SIGNALS}
        handlers |= {
            RELOAD: partial(self._reload, lambda running, _added: worker.use(running)),
            RESTART: partial(self._restart, worker.loop, partial(worker.drain, "SIGUSR2", handed_over=True)),
        }
        worker.run(handlers, watchdog_interval())
        self._log.info("ended")
        return 0

    def _end(self, number: int) -> None:
        self._give_up_restart()
        self._worker.end(number)

    def _is_ending(self) -> bool:
        return self._worker.is_draining

    def _when_used(self, action: Callable[[], None]) -> None:
        self._worker.loop.afterwards(action)


class Supervisor(Life):
    """A relay with workers, which are its children."""

    def run(self) -> int:
        """Start the workers, and wait until the last one has ended."""
        self._loop = Loop(failures.Failures(self._log, partial(self._counts.add, tally.WORKER, tally.FAILURES)))
        self._workers = Workers(self._state, self._counts, self._loop, self._log, self._ended, sockmap=self._sockmap)
        self._code = 0
        handlers: dict[int, Callable[[], None]] = {number: partial(self._end, number) for number in ENDING_SIGNALS}
        handlers |= {
            signal.SIGCHLD: self._workers.bury,
            RELOAD: partial(self._reload, self._workers.tell),
            RESTART: partial(self._restart, self._loop, partial(self._end, RESTART)),
        }
        self._workers.start()
        with signals.handled(self._loop, handlers):
            self._announce()
            if interval := watchdog_interval():
                self._show_life(interval)
                self._loop.every(interval, partial(self._show_life, interval))
            self._loop.every(LOOK_SECONDS, self._workers.look_after)
            self._loop.run()
        self._loop.release()
        self._log.info("ended", exit_code=self._code)
        return self._code

    def _is_ending(self) -> bool:
        return self._workers.is_ending

    def _when_used(self, action: Callable[[], None]) -> None:
        self._workers.when_used(action)

    def _show_life(self, interval: float) -> None:
        """Tell the watchdog that the loops turn: this one, and, a while ago, those of all workers."""
        silence = self._counts.silence()
        if silence < 2 * interval:
            notify(WATCHDOG)
        else:
            self._log.error("a worker hangs, so the watchdog is not notified", seconds=round(silence, 3))

    def _end(self, number: int) -> None:
        """Pass a signal on; a second one ends the workers at once."""
        if number != RESTART:
            self._give_up_restart()
            notify("STOPPING=1")
        self._workers.end(number)

    def _ended(self, code: int) -> None:
        self._code = code
        self._loop.stop()
