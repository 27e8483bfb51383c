"""One Envoy after the other: started, looked after, started again when it has died, and drained in the end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tpctl.envoy.process.admin import Admin, AdminError
from tpctl.envoy.process.child import Voice, exit_in_words, start
from tpctl.relay.loop.loop import Loop
from tpctl.relay.process.crew import HANGING_LOOKS, Deaths

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

START_SECONDS = 60.0
"""For Envoy to serve after its start: a third of a second, on a machine that has nothing else to do."""
_READY_LOOK_SECONDS = 0.05
_DRAIN_LOOK_SECONDS = 0.1
_KILL_SECONDS = 5.0
"""For Envoy to end after SIGTERM."""


class Owner(Protocol):
    """Who has an Envoy run, and is told of it."""

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Put Envoy's files in their places; its command line, and the versions by which it shows that it has them.

        Raises OSError.
        """

    def serves(self, seconds: float) -> None:
        """It has everything, and its listeners are open, so many seconds after its start."""

    def has_died(self) -> None:
        """Another one is going to be started."""

    def gives_up(self) -> None:
        """There will be no other one."""

    def has_ended(self) -> None:
        """As it was told to."""


class Running:
    """The Envoy that runs, if there is one."""

    def __init__(self, loop: Loop, admin: Admin, log: FilteringBoundLogger, owner: Owner) -> None:
        self._loop = loop
        self._admin = admin
        self._log = log
        self._owner = owner
        self._deaths = Deaths()
        self._since = 0.0
        self._silent_looks = 0
        self._is_ending = False
        self.voice = Voice(log)
        self.pid = 0
        """0: none runs."""
        self.starts = 0
        self.is_serving = False
        self._has_served = False

    def start(self) -> None:
        """Start one, unless all is to end."""
        if self._is_ending or self.pid:
            return
        self.voice.forget()
        self.starts += 1
        self._silent_looks = 0
        self._since = time.monotonic()
        try:
            argv, versions = self._owner.command()
            self.pid = start(argv, self.voice.writer)
        except OSError as error:
            self._bury(f"it cannot be started: {error.strerror}")
            return
        self._await(self.pid, versions)

    def _await(self, pid: int, versions: Mapping[str, str]) -> None:
        """Look whether it serves by now."""
        if pid != self.pid or self._is_ending:
            return
        is_late = time.monotonic() - self._since > START_SECONDS
        try:
            is_live, figures = self._admin.is_live(), self._admin.figures()
        except AdminError:
            is_live, figures = False, None
        if figures is not None:
            if is_live and figures.versions.items() >= versions.items() and not figures.warming:
                self.is_serving = self._has_served = True
                self._owner.serves(time.monotonic() - self._since)
                return
            is_late = is_late or any(figures.refused.values())
        if is_late:
            self._log.error("Envoy does not serve", pid=pid, reason=self.voice.last(about="update"))
            self.kill()
            return
        self._loop.later(_READY_LOOK_SECONDS, partial(self._await, pid, versions))

    def look_after(self) -> None:
        """End one that hangs; another one takes its place."""
        if not self.is_serving or self._is_ending:
            return
        try:
            self._admin.figures()
        except AdminError as error:
            self._silent_looks += 1
            if self._silent_looks >= HANGING_LOOKS:
                self._log.error("Envoy hangs and is killed", pid=self.pid, reason=str(error))
                self.kill()
        else:
            self._silent_looks = 0

    def kill(self) -> None:
        """End it at once. Another one takes its place, unless all is to end."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def bury(self) -> None:
        """A child of this process has ended: perhaps this one."""
        if self.pid:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._bury(exit_in_words(status))

    def _bury(self, how: str) -> None:
        pid, self.pid, self.is_serving = self.pid, 0, False
        if self._is_ending:
            self._owner.has_ended()
            return
        told = {"pid": pid, "how": how, "reason": self.voice.last()}
        delay = self._deaths.delay(0, time.monotonic() - self._since)
        if not self._has_served:
            self._log.error("Envoy does not start", **told)
        elif self._deaths.are_too_many(0):
            self._log.error("Envoy has died, like those before it", **told)
        else:
            self._owner.has_died()
            self._log.error("Envoy has died and is started again", **told, seconds=delay)
            self._loop.later(delay, self.start)
            return
        self._owner.gives_up()

    def end(self, seconds: float) -> None:
        """Accept nothing new, and end with the last request and connection of TCP, or after so many seconds.

        0 is at once.
        """
        was_serving, self._is_ending = self.is_serving and not self._is_ending, True
        if not self.pid:
            self._owner.has_ended()
            return
        try:
            if seconds and was_serving:
                self._admin.stop_accepting()
                self._log.info("draining", seconds=seconds)
                self._drained(self.pid, time.monotonic() + seconds)
                return
        except AdminError as error:
            self._log.warning("Envoy cannot be told to drain", reason=str(error))
        self.kill()

    def _drained(self, pid: int, end: float) -> None:
        if pid != self.pid:
            return
        try:
            left = self._admin.figures().busy
        except AdminError:
            left = 0
        if left and time.monotonic() < end:
            self._loop.later(_DRAIN_LOOK_SECONDS, partial(self._drained, pid, end))
            return
        if left:
            self._log.warning("ending what is still running", reason="the drain timeout has passed", connections=left)
        os.kill(pid, signal.SIGTERM)
        self._loop.later(_KILL_SECONDS, self.kill)
