"""DNS beside Envoy: a worker of the relay, a child as Envoy is, with sockets that outlive it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tpctl.envoy.process.child import end_with
from tpctl.relay.connections.tally import Tally
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process import activation
from tpctl.relay.process.privileges import raise_descriptor_limit, reserved_descriptors
from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import Sockets, begin_listening, share_port
from tpctl.relay.process.workers import Workers, close
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_NOTHING = Running(Settings(), {})


class Prepared(NamedTuple):
    """A state that can be taken into use at once, or dropped."""

    running: Running
    added: Sockets
    """The sockets that have been opened for it."""


class Dns:
    """Who answers DNS, if anybody is to."""

    def __init__(
        self, loop: Loop, log: FilteringBoundLogger, changed: Callable[[], None], forked: Callable[[], None]
    ) -> None:
        """`changed` is called when a process has been started or has ended.

        `forked` is called in each, to let go of what is only this process's.
        """
        self._loop = loop
        self._log = log.bind(about="DNS")  # or "a worker has died" would not say which
        self._changed = changed
        self._forked = forked
        self._running = _NOTHING
        self._workers: Workers | None = None
        self._leaving: list[Workers] = []
        """Whose listeners have gone: they answer what they were asked before."""

    @property
    def pid(self) -> int:
        """Of the process that answers; 0: there is none."""
        return next(iter(self._workers.pids), 0) if self._workers else 0

    @property
    def starts(self) -> int:
        """How often one was started for the present listeners."""
        return self._workers.starts if self._workers else 0

    @property
    def settings(self) -> Settings:
        """What is answered; without listeners, nothing."""
        return self._running.settings

    @property
    def has_ended(self) -> bool:
        """Whether there is no process, and none to come."""
        return self._workers is None and not self._leaving

    def prepare(self, settings: Settings, left_soon: frozenset[int]) -> Prepared:
        """Open the sockets that settings need, and change nothing that anybody would see. Raises TpctlError.

        Ports move between DNS and Envoy in one step: those of `left_soon` are Envoy's until it has taken the same file,
        and it may take those that are not needed any more before they are closed.
        """
        with reserved_descriptors():
            prepared = Prepared(*(self._running if settings.listeners else _NOTHING).renewed(settings, left_soon))
        self._share_leaving(prepared, shared=True)
        return prepared

    def inherit(self, settings: Settings) -> Prepared:
        """The first state, with the sockets that an earlier process has left with the service manager."""
        with reserved_descriptors():
            running = Running.begin(settings, activation.match(settings, activation.inherited(), self._log))
        return Prepared(running, running.sockets)

    def drop(self, prepared: Prepared) -> None:
        """Close what was opened: the state will not be used."""
        for sockets in prepared.added.values():
            close(sockets)
        self._share_leaving(prepared, shared=False)

    def _share_leaving(self, prepared: Prepared, *, shared: bool) -> None:
        for place in self._running.sockets.keys() - prepared.running.sockets.keys():
            if place.kind is socket.SOCK_STREAM:
                for sock in self._running.sockets[place]:
                    share_port(sock, shared=shared)

    def use(self, prepared: Prepared) -> None:
        """Answer by this state from now on."""
        before, (self._running, added) = self._running.settings, prepared
        after = self._running.settings
        if after == before:
            return
        begin_listening(after, added)
        activation.keep(before, self._running)
        if not after.listeners:
            self._leave()
            self._changed()
            self._log.info("DNS is not answered any more")
            return
        if self._workers is not None:
            self._workers.tell(self._running, added)
        else:
            raise_descriptor_limit()
            self._begin()
        self._changed()
        listens = {one.name: show(one.listen.address) for one in after.served}
        self.when_used(partial(self._log.info, "DNS is answered as the file says", pid=self.pid, **listens))

    def when_used(self, action: Callable[[], None]) -> None:
        """Do something when the state of the last `use` is that by which DNS is answered."""
        if self._workers is None:
            action()
        else:
            self._workers.when_used(action)

    def _begin(self) -> None:
        def ended(_code: int) -> None:
            if workers is self._workers:
                self._workers = None
            else:
                self._leaving.remove(workers)

        counts = Tally(self._running.settings.workers)
        workers = self._workers = Workers(
            self._running,
            counts,
            self._loop,
            self._log,
            ended,
            gives_up=False,
            forked=partial(self._be_a_child, os.getpid()),
            changed=self._changed,
        )
        workers.start()

    def _be_a_child(self, supervisor: int) -> None:
        """What a forked process does first."""
        end_with(supervisor)
        os.setpgid(0, 0)  # a terminal's Ctrl-C is for the supervisor, which lets connections finish before
        self._forked()

    def _leave(self) -> None:
        if self._workers is not None:
            workers, self._workers = self._workers, None
            self._leaving.append(workers)
            workers.end(signal.SIGTERM)

    def bury(self) -> None:
        """Children of this process have ended: perhaps these."""
        for workers in self._all():
            workers.bury()

    def look_after(self) -> None:
        """End one that hangs; another one takes its place."""
        for workers in self._all():
            workers.look_after()

    def end(self, number: int) -> None:
        """Pass an ending signal on."""
        for workers in self._all():
            workers.end(number)

    def _all(self) -> list[Workers]:
        return [*self._leaving, *([self._workers] if self._workers else ())]
