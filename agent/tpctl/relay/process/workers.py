"""The workers of a relay, as the processes they are: started, told of other states, replaced, and ended.

For whoever supervises them: the relay's own supervisor, or that of Envoy, whose DNS they answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from select import EPOLLIN
from typing import TYPE_CHECKING, NoReturn

from tpctl.relay.connections import tally
from tpctl.relay.connections.sockmap import Sockmap
from tpctl.relay.connections.tally import Tally
from tpctl.relay.loop import failures
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process import channel
from tpctl.relay.process.crew import LOOK_SECONDS, Deaths, Member, Reloads
from tpctl.relay.process.notify import watchdog_interval
from tpctl.relay.process.privileges import reserved_descriptors
from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import Sockets, deal
from tpctl.relay.process.worker import AT_ONCE, DRAINING_SIGNALS, ENDING_SIGNALS, Worker
from tpctl.system.log import dropped, finish

if TYPE_CHECKING:
    import socket

    from structlog.typing import FilteringBoundLogger

RELOAD, RESTART = signal.SIGHUP, signal.SIGUSR2
HANDLED = (*ENDING_SIGNALS, RELOAD, RESTART, signal.SIGCHLD)
"""What a supervisor handles, and a worker must not take before it has handlers of its own."""


class Workers:
    """Children of this process, which has their sockets too: for restarts, and for those that come later."""

    def __init__(
        self,
        running: Running,
        counts: Tally,
        loop: Loop,
        log: FilteringBoundLogger,
        ended: Callable[[int], None],
        *,
        sockmap: Sockmap | None = None,
        gives_up: bool = True,
        forked: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`ended` is called with an exit code when the last one has ended, and no other is to come.

        `gives_up` makes that so when one dies over and over, and is the last; otherwise another one is started for
        ever. `forked` is called in each worker, to let go of what is only the supervisor's, and `changed` here when one
        has been started or has ended.
        """
        self._running = running
        self._counts = counts
        self._loop = loop
        self._log = log
        self._ended = ended
        self._sockmap = sockmap
        self._gives_up = gives_up
        self._forked = forked
        self._changed = changed
        self._members: dict[int, Member] = {}
        """By their pids."""
        self._deaths = Deaths()
        self._reloads = Reloads()
        self._code = 0
        self.is_ending = False
        self.starts = 0
        """How many have been started."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Of those that run."""
        return tuple(self._members)

    def start(self) -> None:
        """Start all of them. Without room for another process, or a descriptor, it raises OSError or tries later."""
        for number in range(self._running.settings.workers):
            if self._gives_up:
                self._start(number)
            else:
                self._try_to_start(number)

    def _start(self, number: int) -> None:
        mine, theirs = channel.pair()
        self._counts.be(number)
        self._counts.beat()  # from now on it is waited for
        member = Member(number, mine, time.monotonic(), self._counts.beat_of(number))
        # Until the worker has handlers of its own: those of this process would take a signal and do nothing.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            self._loop.watch(mine.fileno(), EPOLLIN, partial(self._on_answer, member))
            pid = os.fork()
            if pid == 0:
                mine.close()
                for other in self._members.values():
                    other.channel.close()
                self._work(number, theirs)
            self._members[pid] = member
            self.starts += 1
        except OSError:
            self._hang_up(member)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
            self._counts.be(self._running.settings.workers)
        self._changed()

    def _work(self, number: int, supervisor: socket.socket) -> NoReturn:
        """The life of a forked worker; never returns into the supervisor's code."""
        code, log = 1, self._log
        try:
            signal.set_wakeup_fd(-1)
            self._loop.release()
            self._forked()
            beat = min(LOOK_SECONDS, watchdog_interval(os.getppid()) or LOOK_SECONDS)
            share = self._running.share(number)
            for place, sockets in self._running.sockets.items():
                for sock in sockets:
                    if sock not in share[place]:
                        sock.close()
            os.environ.pop("NOTIFY_SOCKET", None)
            worker = Worker(self._running.settings, self._counts, log, supervisor, self._sockmap)
            worker.use(Running(self._running.settings, share, self._running.slots))
            worker.run({RESTART: partial(worker.drain, "SIGUSR2", handed_over=True)}, beat)
            code = 0
        except Exception as error:
            log.error("a worker failed", pid=os.getpid(), error=failures.shown(error), at=failures.place(error))
            log.debug("a worker failed", exc_info=error)
        finally:
            finish()
            os._exit(code)

    def tell(self, running: Running, added: Sockets) -> None:
        """Have them go on with another state, of which `added` are the sockets that are new: see `when_used`."""
        for worker in self._members.values():
            share = {place: deal(sockets, worker.number, running.settings.workers) for place, sockets in added.items()}
            with contextlib.suppress(OSError):  # it has just died or hangs: another one will have this state
                channel.send(worker.channel, running, share)
                worker.sent += 1
        for place in self._running.sockets.keys() - running.sockets.keys():
            close(self._running.sockets[place])
        self._running = running

    def when_used(self, action: Callable[[], None]) -> None:
        """Do something when each of them does as it was told last, or has said why it cannot."""
        self._reloads.begin(self._members, action)

    def _on_answer(self, worker: Member, _mask: int) -> None:
        """One has answered, or has ended."""
        with contextlib.suppress(BlockingIOError):
            if channel.is_answer(worker.channel):
                worker.taken += 1
                self._reloads.look(self._members)
            else:
                self._loop.forget(worker.channel.fileno())

    def _hang_up(self, worker: Member) -> None:
        self._loop.forget(worker.channel.fileno())
        worker.channel.close()

    def look_after(self) -> None:
        """End those that hang; others take their place."""
        self._counts.count(tally.DROPPED_LINES, dropped())
        for pid, worker in self._members.items():
            if worker.look(self._counts.beat_of(worker.number), is_ending=self.is_ending):
                self._log.error("a worker hangs and is killed", pid=pid)
                os.kill(pid, signal.SIGKILL)

    def end(self, number: int) -> None:
        """Pass a signal on; a second one ends them at once."""
        # Kept open here, the sockets would go on accepting for workers that have ended.
        for sockets in self._running.sockets.values():
            close(sockets)
        for pid in self._members:
            os.kill(pid, AT_ONCE if self.is_ending and number in DRAINING_SIGNALS else number)
        self.is_ending = True
        if not self._members:  # all have died, and others were to take their place: no end of one is to come
            self._ended(self._code)

    def bury(self) -> None:
        """Some have ended. One that ends unasked is replaced."""
        for pid in self.pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            worker = self._members.pop(pid)
            self._hang_up(worker)
            self._counts.bury(worker.number)
            code = os.waitstatus_to_exitcode(status)
            if not self.is_ending:
                self._replace_later(worker.number, time.monotonic() - worker.since, pid=pid, status=code)
                self._reloads.look(self._members)
            else:
                if status:
                    self._code = 1
                    self._log.error("a worker has died", pid=pid, status=code)
                if not self._members:
                    self._ended(self._code)
            self._changed()

    def _replace_later(self, number: int, lived: float, **told: object) -> None:
        """Start a worker in the place of one that has died. If none is left, and none gets far, that is the end."""
        delay = self._deaths.delay(number, lived)
        if self._gives_up and self._deaths.are_too_many(number) and not self._members:
            self._log.error("a worker has died, like those before it: the relay gives up", **told)
            self._ended(1)
            return
        self._log.error("a worker has died and is replaced", **told, seconds=delay)
        self._loop.later(delay, partial(self._try_to_start, number))

    def _try_to_start(self, number: int) -> None:
        if self.is_ending:
            return
        try:
            with reserved_descriptors():
                self._start(number)
        except OSError as error:
            self._replace_later(number, 0.0, reason=error.strerror)


def close(sockets: list[socket.socket]) -> None:
    """Close sockets of a state."""
    for sock in sockets:
        sock.close()
