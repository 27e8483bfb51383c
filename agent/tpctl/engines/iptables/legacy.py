"""The legacy variant: its tables are written in one of two ways, under the lock iptables-legacy itself takes.

In process, through python-iptables, where that is installed and shown to work with this iptables (`libiptc`); else by
iptables-legacy-restore, which is there wherever rules can be listed. Both carry out the same changes, one commit a
table.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpctl.engines.iptables import libiptc, saved
from tpctl.engines.iptables.backend import TransientError, read_tables, refusal
from tpctl.engines.iptables.change import TableChange, restore_text
from tpctl.engines.iptables.tools import Tools
from tpctl.engines.iptables.trial import LOCK_OF_ITS_OWN
from tpctl.spec.engine_options import EngineOptions
from tpctl.system import runner

LOCK = Path("/run/xtables.lock")
LOCK_POLL_SECONDS = 0.02
MOST_OPERATIONS = 500
"""For python-iptables, which builds each rule in Python, and longer the more there are: 4000 take it six seconds."""


class LegacyBackend:
    """One family of the legacy variant."""

    variant = "legacy"

    def __init__(self, tools: Tools, options: EngineOptions) -> None:
        self.tools = tools
        self.options = options

    def save(self) -> dict[str, saved.SavedTable]:
        """What iptables-legacy-save lists; nothing when no table exists, so that none is created."""
        return read_tables(self.tools)

    def commit(self, changes: tuple[TableChange, ...], *, comments: bool) -> None:
        """Commit the tables, one after the other."""
        work = tuple(change for change in changes if change.operations)
        with xtables_lock(self.options.wait_seconds):
            if self._obstacle(work, comments) is None:
                libiptc.commit(self.tools.family, work, comments=comments)
            else:
                self._restore(work, comments)

    def way(self, changes: tuple[TableChange, ...], *, comments: bool) -> str:
        """What `commit` carries these changes out with, and why."""
        obstacle = self._obstacle(changes, comments)
        return "python-iptables" if obstacle is None else f"iptables-legacy-restore, because {obstacle}"

    def _obstacle(self, changes: tuple[TableChange, ...], comments: bool) -> str | None:
        """Why python-iptables is not to carry them out; None when it is."""
        operations = sum(len(change.operations) for change in changes)
        if operations > MOST_OPERATIONS:
            return f"{operations} operations would take python-iptables long"
        return libiptc.obstacle(self.tools, changes, comments=comments)

    def _restore(self, changes: tuple[TableChange, ...], comments: bool) -> None:
        """Deletes by number, as libiptc does: nobody changes the tables meanwhile. Policies keep their counters."""
        policies = {name: table.policies for name, table in self.save().items()}
        text = restore_text(changes, comments=comments, numbered=True, policies=policies)
        done = runner.run([self.tools.restore, "--noflush", "--counters"], stdin=text, variables=LOCK_OF_ITS_OWN)
        if not done.ok:
            raise refusal(done, self.tools, changes)


_held: list[int] = []


@contextmanager
def xtables_lock(wait_seconds: float) -> Iterator[None]:
    """Hold the lock of iptables(8) -w: a table is read, changed and written back whole. May be nested.

    Raises TransientError when somebody else still has it after `wait_seconds`. Where no file can be made nobody can
    have it, and a full or read-only disk must not bar the way out.
    """
    if _held:
        yield
        return
    try:
        descriptor = os.open(LOCK, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC):
            raise
        yield
        return
    try:
        _wait_for(descriptor, wait_seconds)
        _held.append(descriptor)
        runner.INHERITED.add(descriptor)
        yield
    finally:
        runner.INHERITED.discard(descriptor)
        _held.clear()
        os.close(descriptor)


def _wait_for(descriptor: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TransientError(f"another program has held {LOCK} for {seconds:g} s; see --wait") from None
            time.sleep(LOCK_POLL_SECONDS)
        else:
            return
