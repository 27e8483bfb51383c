"""Runs Envoy with what the file says, follows its changes, and sees to the end.

Envoy is a child, not this process's successor: it cannot read the file or tell systemd that it serves; of an update
that it refuses it may keep a part; and after SIGTERM it ends at once, with every connection.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.envoy.documents import BOOTSTRAP, CLUSTERS, LISTENERS, Documents
from tpctl.envoy.process.admin import Admin
from tpctl.envoy.process.asking import where_to_ask
from tpctl.envoy.process.child import arguments
from tpctl.envoy.process.dns import Dns, Prepared
from tpctl.envoy.process.folder import Folder
from tpctl.envoy.process.rollout import Outcome, Rollout, with_clusters
from tpctl.envoy.process.running import Running
from tpctl.envoy.process.staging import Staged, stage
from tpctl.envoy.process.standing import FILE, Standing, network
from tpctl.envoy.process.wanted import Complaint, Load, Wanted
from tpctl.envoy.process.watch import Watch
from tpctl.relay.loop import failures, signals
from tpctl.relay.loop.loop import Loop, Timer
from tpctl.relay.process.crew import LOOK_SECONDS
from tpctl.relay.process.notify import WATCHDOG, notify, reloading, watchdog_interval
from tpctl.relay.settings.listen import show
from tpctl.system.errors import HostError, InputError, described

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LINGER_SECONDS = 3600
"""How long connections go on through what an update has replaced: Envoy closes them then, and the clusters go."""
RETRY_SECONDS = 10.0
"""After which a file that is not in order is read again: what it refers to may have come by then."""
_DRAINING = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (*_DRAINING, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """With what Envoy is run, as long as this process lives."""

    file: str
    """The configuration, for messages."""
    envoy: str
    """The program."""
    folder: Path
    admin: Path
    load: Load
    complaint: Complaint


def run(wanted: Wanted, about: Surroundings, log: FilteringBoundLogger) -> int:
    """Run Envoy until this process is told to end; the exit code.

    Raises HostError when the folder is another process's, InputError when a file of the configuration is unusable.
    """
    if os.geteuid() == 0:
        log.warning("running as root: unless the policy's data plane user is root, Envoy's connections are captured")
    # Until there is somebody to handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    folder = Folder(about.folder)
    folder.clear()
    return Supervisor(wanted, about, folder, log).run()


class Supervisor:
    """What Envoy has, what it should have, and how it gets that."""

    def __init__(self, wanted: Wanted, about: Surroundings, folder: Folder, log: FilteringBoundLogger) -> None:
        self._about = about
        self._folder = folder
        self._log = log
        self._loop = Loop(failures.Failures(log, lambda: None))
        self._admin = Admin(about.admin)
        self._envoy = Running(self._loop, self._admin, log, self)
        self._dns = Dns(self._loop, log, self._dns_has_changed, self._let_go)
        self._coming_dns: Prepared | None = None
        """What is going to be used when Envoy has taken the rest of the same file."""
        self._watch = Watch(self._loop, partial(self._reload, "a file has changed"))
        self._standing = Standing(about.file, str(about.admin), network(), os.getpid())
        self._wanted = wanted
        self._staged = self._stage(wanted, None)
        self._present = self._staged.documents
        """What Envoy has, or should have: the documents, and clusters that are no longer named."""
        self._started_with = (self._present.bootstrap, wanted.workers)
        """What Envoy takes from its start until its end."""
        self._rollout: Rollout | None = None
        self._retry: Timer | None = None
        self._again = ""
        """Why the file is to be read when what is being done is done."""
        self._told_of_reload = False
        """Whether systemd waits for the end of a reload."""
        self._complained: str | None = None
        """What was last logged of a file that is not in order."""
        self._has_served = False
        self._warn(wanted)
        self._is_ending = self._at_once = self._envoy_has_ended = False
        self._code = 0

    def run(self) -> int:
        """Start everything, and wait until everything has ended."""
        handlers: dict[int, Callable[[], None]] = {
            number: partial(self._end, number) for number in (*_DRAINING, signal.SIGQUIT)
        }
        handlers |= {signal.SIGHUP: partial(self._reload, "SIGHUP"), signal.SIGCHLD: self._bury}
        self._begin_dns()
        with signals.handled(self._loop, handlers):
            self._watch.look_at(self._wanted.watched)
            self._envoy.start()
            if interval := watchdog_interval():
                self._loop.every(interval, lambda: notify(WATCHDOG))
            self._loop.every(LOOK_SECONDS, self._envoy.look_after)
            self._loop.every(LOOK_SECONDS, self._dns.look_after)
            self._loop.run()
        self._envoy.voice.close()
        self._loop.release()
        self._folder.clear()
        self._log.info("ended", exit_code=self._code)
        return self._code

    def _begin_dns(self) -> None:
        """Answer DNS, before Envoy is there. Raises HostError when a socket cannot be had."""
        try:
            self._dns.use(self._dns.inherit(self._wanted.dns))
        except HostError:
            self._folder.clear()
            raise

    # What the file says

    def _stage(self, wanted: Wanted, before: Staged | None) -> Staged:
        """Copies of everything, which Envoy itself finds in order. Raises TpctlError."""
        try:
            staged = stage(wanted.documents, self._about.folder, before, self._folder.put)
            if before is None or staged.documents != before.documents:
                self._ask(wanted, staged)
        except BaseException:
            self._keep_copies_of(before)
            raise
        return staged

    def _warn(self, wanted: Wanted) -> None:
        for line in wanted.warnings:
            self._log.warning(line)

    def _ask(self, wanted: Wanted, staged: Staged) -> None:
        """Raise InputError with what Envoy says, unless it takes the documents."""
        complaint = self._about.complaint(staged.documents)
        if complaint is not None:
            for copy, original in staged.originals().items():
                complaint = complaint.replace(copy, original)
            raise InputError(f"file {self._about.file}: {wanted.located(complaint)}")

    def _keep_copies_of(self, staged: Staged | None) -> None:
        """Remove all copies but these: nobody reads them any more."""
        kept = {secret.folder for secret in staged.secrets.values()} if staged else set()
        for place in (self._about.folder / "sds").glob("*/*"):
            name = str(place.relative_to(self._about.folder))
            if place.is_dir() and name not in kept:
                self._folder.remove(name)

    def _reload(self, why: str) -> None:
        """Read everything again, and give Envoy what has changed. What is not in order leaves everything as it was."""
        if self._is_ending:
            return
        if why == "SIGHUP" and not self._told_of_reload:
            self._told_of_reload = True
            reloading()
        if self._rollout is not None or not self._envoy.is_serving:
            self._again = why
            return
        self._log.debug("reading the configuration", reason=why)
        before = self._watch.looks()
        try:
            wanted = self._about.load()
            staged = self._stage(wanted, self._staged)
            self._coming_dns = self._dns.prepare(wanted.dns, self._present.ports())
        except Exception as error:  # noqa: BLE001 - systemd waits for the end of a reload, whatever it is
            self._log.debug("the configuration cannot be read", exc_info=error)
            self._watch.look_at(self._wanted.watched, before)
            self._keep_copies_of(self._staged)
            self._not_in_order(described(error))
            return
        self._watch.look_at(wanted.watched, before)
        self._standing.restart = (staged.documents.bootstrap, wanted.workers) != self._started_with
        if self._standing.restart:
            self._log.warning("a change takes effect when Envoy is started the next time", file=self._about.file)
        coming = with_clusters(staged.documents, self._present.clusters)
        self._roll_out(coming, partial(self._rolled_out, wanted, staged, coming))

    def _roll_out(self, coming: Documents, ended: Callable[[Outcome], None]) -> None:
        way = (self._present, coming)
        self._rollout = Rollout(self._loop, self._admin, self._folder.put, way, ended)

    def _not_in_order(self, complaint: str) -> None:
        """The file, or one that it refers to, cannot be used."""
        self._standing.problems = complaint.splitlines()
        self._tell()
        if complaint != self._complained:
            problems = complaint.splitlines()
            self._log.error("the configuration is invalid, the old one stays", problems=problems)
        self._try_later(complaint)
        self._rest()

    def _try_later(self, complaint: str) -> None:
        self._complained = complaint
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.later(RETRY_SECONDS, partial(self._try_again, complaint))

    def _try_again(self, complaint: str) -> None:
        if self._complained == complaint:
            self._reload("another try")

    def _rolled_out(self, wanted: Wanted, staged: Staged, coming: Documents, outcome: Outcome) -> None:
        """Envoy has taken an update, or refused it."""
        self._rollout = None
        if outcome.refused is not None:
            self._refuse(outcome)
            return
        was_complained_of, self._complained = self._complained, None
        self._wanted, self._staged, self._present = wanted, staged, coming
        self._standing.problems = []
        self._keep_copies_of(staged)
        if self._coming_dns is not None:
            self._dns.use(self._coming_dns)
            self._coming_dns = None
        self._tell()
        if outcome.steps or was_complained_of:
            self._log.info("Envoy serves what the file says", file=self._about.file, **versions_of(coming))
        if outcome.steps:
            self._warn(wanted)
        if coming.clusters != staged.documents.clusters:
            self._loop.later(LINGER_SECONDS, partial(self._forget_clusters, coming))
        self._rest()

    def _drop_dns(self) -> None:
        if self._coming_dns is not None:
            self._dns.drop(self._coming_dns)
            self._coming_dns = None

    def _refuse(self, outcome: Outcome) -> None:
        self._drop_dns()
        if outcome.reason:
            what, reason = "an update has not reached Envoy", outcome.reason
            self._try_later(f"{outcome.refused}: {reason}")
        else:
            what, reason = "Envoy has refused an update", self._envoy.voice.last(about="update")
            self._standing.refused += 1
        self._standing.problems = [f"{what}: {reason}"]
        self._keep_copies_of(self._staged)
        self._tell()
        self._log.error(f"{what}, the old configuration stays", document=outcome.refused, reason=reason)
        if not outcome.is_back:
            self._log.error("Envoy does not take the old configuration back, and is started again with it")
            self._envoy.kill()
        self._rest()

    def _forget_clusters(self, documents: Documents) -> None:
        """Take away the clusters that are no longer named, if nothing has changed since."""
        if self._present is documents and self._rollout is None and self._envoy.is_serving and not self._is_ending:
            self._roll_out(self._staged.documents, self._forgot)

    def _forgot(self, outcome: Outcome) -> None:
        """Envoy has let go of clusters. If it has not, they stay until the next update."""
        self._rollout = None
        if outcome.refused is None:
            self._present = self._staged.documents
        self._tell()
        self._rest()

    def _rest(self) -> None:
        """Nothing is being changed any more: begin with what was asked for meanwhile, or tell who waits for the end."""
        if self._again:
            why, self._again = self._again, ""
            self._reload(why)
        elif self._told_of_reload:
            self._told_of_reload = False
            self._dns.when_used(self._reloaded)

    def _reloaded(self) -> None:
        """Tell the service manager, unless it waits for another reload, or for the end."""
        if not self._told_of_reload and not self._is_ending:
            notify("READY=1")

    def _tell(self) -> None:
        """Write down how Envoy stands. Before it is logged or told: who hears of it may look at once."""
        self._standing.versions = versions_of(self._present)
        self._standing.originals = self._staged.originals()
        self._standing.envoy, self._standing.starts = self._envoy.pid, self._envoy.starts
        listeners = self._dns.settings.listeners
        self._standing.dns = [show(one.listen.address) for one in listeners]
        self._standing.dns_asked = [where for one in listeners if (where := where_to_ask(one)) is not None]
        self._standing.dns_pid, self._standing.dns_starts = self._dns.pid, self._dns.starts
        try:
            self._folder.put(FILE, self._standing.written())
        except OSError as error:
            self._log.warning("what `tpctl status` tells cannot be written down", reason=error.strerror)

    # What becomes of the processes

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Envoy is to be started, with the last configuration that was good."""
        for name, content in self._present.files().items():
            self._folder.put(name, content)
        self._started_with, self._standing.restart = (self._present.bootstrap, self._wanted.workers), False
        self._standing.connections = self._wanted.connections
        options = {"--concurrency": self._wanted.workers, "--drain-time-s": LINGER_SECONDS}
        argv = arguments(self._about.envoy, str(self._about.folder / BOOTSTRAP), options)
        return argv, versions_of(self._present)

    def serves(self, seconds: float) -> None:
        """Envoy serves, so many seconds after its start."""
        self._tell()
        self._log.info("Envoy serves", pid=self._envoy.pid, seconds=round(seconds, 2), **versions_of(self._present))
        self._announce()
        self._rest()

    def _announce(self) -> None:
        """Tell the service manager when everything serves for the first time."""
        if not self._has_served:
            self._has_served = True
            self._log.info("ready", pid=os.getpid(), connections=self._wanted.connections)
            notify("READY=1")
            self._again = self._again or "it may have changed while Envoy was started"

    def has_died(self) -> None:
        """Envoy has died, and is going to be started again."""
        if self._rollout is not None:
            self._rollout.give_up()
            self._rollout = None
            self._drop_dns()
            self._keep_copies_of(self._staged)
            self._again = self._again or "Envoy has died while it was given an update"
        self._tell()

    def gives_up(self) -> None:
        """Envoy cannot be kept alive."""
        self._code = 1
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        """Accept nothing new, and let connections finish; a second signal, or SIGQUIT, ends them at once."""
        self._at_once = self._is_ending or number == signal.SIGQUIT
        self._is_ending = True
        notify("STOPPING=1")
        self._log.info("ending", reason=signal.Signals(number).name)
        if self._rollout is not None:
            self._rollout.give_up()
        self._envoy.end(0 if self._at_once else self._wanted.drain_seconds)

    def has_ended(self) -> None:
        """Envoy has, as it was told to. DNS is answered until then: connections that have not ended may need it."""
        self._envoy_has_ended = True
        self._dns.end(signal.SIGQUIT if self._at_once else signal.SIGTERM)
        self._stop_when_all_have_ended()

    def _stop_when_all_have_ended(self) -> None:
        if self._envoy_has_ended and self._dns.has_ended:
            self._loop.stop()

    def _bury(self) -> None:
        """Children have ended."""
        self._envoy.bury()
        self._dns.bury()
        self._stop_when_all_have_ended()

    def _dns_has_changed(self) -> None:
        """Another process answers DNS, or none."""
        if self._has_served and not self._is_ending:
            self._tell()

    def _let_go(self) -> None:
        """In a forked process, which answers DNS: what is only this one's."""
        self._envoy.voice.let_go()
        self._folder.let_go()


def versions_of(documents: Documents) -> dict[str, str]:
    """Of the listeners and clusters."""
    versions = documents.versions()
    return {name: versions[name] for name in (CLUSTERS, LISTENERS)}
