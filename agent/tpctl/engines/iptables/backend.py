"""The two ways into the kernel: iptables-restore for the nft variant, libiptc (in `legacy`) for the legacy one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tpctl.engines import refused
from tpctl.engines.iptables import saved
from tpctl.engines.iptables.change import TableChange, restore_text
from tpctl.engines.iptables.tools import Tools
from tpctl.engines.presence import may_hold_iptables
from tpctl.spec.engine_options import EngineOptions
from tpctl.system.errors import ApplyError, HostError
from tpctl.system.runner import Finished, run

RESOURCE_PROBLEM = 4
"""Exit code of iptables when the lock is held or the kernel asks to try again (xtables.h)."""

_RETRY_WORTHY = ("Another app is currently holding", "Resource temporarily unavailable", "try again", "File exists")
_NO_CGROUP = ("Extension cgroup revision", 'unknown option "--path"', "'cgroup': no such parameter")
"""What iptables-restore and python-iptables say where the kernel only has a match that knows net_cls, or none."""
_NO_TABLE = ("can't initialize", "unable to initialize", "able does not exist", "CHAIN_ADD failed", "TABLE_ADD failed")


class TransientError(ApplyError):
    """The kernel or another program was in the way; the same change may succeed in a moment."""


class Backend(Protocol):
    """Reads and changes the tables of one family in one variant."""

    variant: str

    def save(self) -> dict[str, saved.SavedTable]:
        """What the tables hold now. Raises ApplyError when they cannot be read."""
        ...

    def commit(self, changes: tuple[TableChange, ...], *, comments: bool) -> None:
        """Carry out the changes, one commit a table, in order.

        Raises TransientError when trying again may help, HostError when the kernel lacks a table, otherwise ApplyError.
        Tables before the one that failed are then changed: the caller rolls back.
        """
        ...


class RestoreBackend:
    """The nft variant: one iptables-restore process a family."""

    variant = "nft"

    def __init__(self, tools: Tools, options: EngineOptions) -> None:
        self.tools = tools
        self.options = options

    def save(self) -> dict[str, saved.SavedTable]:
        """What iptables-save lists."""
        return read_tables(self.tools)

    def commit(self, changes: tuple[TableChange, ...], *, comments: bool) -> None:
        """Feed the restore text to iptables-restore --noflush."""
        wait = ["--wait", str(self.options.wait_seconds)] if self.options.wait_seconds else []
        if wait and self.options.wait_interval_microseconds:
            wait += ["--wait-interval", str(self.options.wait_interval_microseconds)]
        done = run([self.tools.restore, "--noflush", *wait], stdin=restore_text(changes, comments=comments))
        if not done.ok:
            raise refusal(done, self.tools, changes)


def read_tables(tools: Tools) -> dict[str, saved.SavedTable]:
    """Run a *-save program, but only when a table exists: that of the legacy variant would create one."""
    if not may_hold_iptables(tools.variant, tools.family):
        return {}
    done = run([tools.save, "-c"])
    if not done.ok:
        raise _cause(done, tools, ()) or ApplyError(f"the rules cannot be read: {done.failure()}")
    return saved.read(done.stdout)


def refusal(done: Finished, tools: Tools, changes: Iterable[TableChange]) -> ApplyError | HostError:
    """The error a failed restore of these changes means: what the kernel says of the cause comes first."""
    return _cause(done, tools, [change.table for change in changes]) or classify(done)


def _cause(done: Finished, tools: Tools, tables: Iterable[str]) -> HostError | None:
    if tools.variant == "nft":
        return refused.cause_in_nf_tables(done.stderr)
    return refused.cause_in_x_tables(tools.family, tables)


def classify(done: Finished) -> ApplyError | HostError:
    """The error a failed restore means."""
    said = done.stderr + done.stdout
    if lacks_cgroup(said):
        return no_cgroup(done.failure())
    if any(hint in said for hint in _NO_TABLE):
        return HostError(f"this kernel lacks a table that is needed: {done.failure()}")
    if done.exit_code == RESOURCE_PROBLEM or any(hint in said for hint in _RETRY_WORTHY):
        return TransientError(done.failure())
    return ApplyError(done.failure())


def lacks_cgroup(said: str) -> bool:
    """Whether a refusal means that the kernel cannot match a control group by its path."""
    return any(hint in said for hint in _NO_CGROUP)


def no_cgroup(said: str) -> HostError:
    """The error that is."""
    return HostError(
        f"iptables cannot match control groups on this kernel ({said}): --cgroup needs the module xt_cgroup of "
        "Linux 4.5 or later; load it (modprobe xt_cgroup), or use --engine nftables"
    )
