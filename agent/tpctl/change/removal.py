"""Uninstall from beginning to end, and what other changes that take something away share with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

from tpctl.change import before, confirm, draining, finishing, loopback, routing
from tpctl.change.steps import Step, go_through
from tpctl.change.undo import REMOVED, Failures
from tpctl.engines import leftovers, registry
from tpctl.engines.base import Engine, Removal
from tpctl.host.privilege import require_root
from tpctl.persist import in_step
from tpctl.record import state, taken_back
from tpctl.system.errors import ApplyError, HostError

FLUSHED_TABLES = ("nat", "raw")


def uninstall(*, dry_run: bool = False, confirm_within: float | None = None, keep_units: bool = False) -> Removal:
    """Take away what tpctl or kumactl installed, by every engine, in every variant and family, and nothing else.

    Needs no record, no user and no configuration. Raises ApplyError when the kernel refused, HostError when the host
    has no tool at all to look with. What would install it again at the next boot goes too, except with `keep_units`.
    """
    require_root("tpctl uninstall")
    if dry_run:
        removal = remove_everything(state.load(), dry_run=True)
        files = () if keep_units else in_step.remove_files(dry_run=True)
        return dataclasses.replace(removal, removed=(*removal.removed, *files))
    with state.locked(is_way_out=confirm_within is None) as unlocked:
        record, pending = state.load(), confirm.load()
        taken_back.forget()
        if confirm_within is not None:
            # A reboot before the confirmation is a way back too, so the units stay until it has come.
            with confirm.guarded("uninstall", confirm_within, record) as armed:
                removal = remove_everything(record)
            if armed and not removal.removed and pending is None:
                confirm.drop(armed)
            return removal
        removal = remove_everything(record)
        if unlocked:
            notices = (f"warning: {unlocked}; it was done without", *removal.notices)
            removal = dataclasses.replace(removal, notices=notices)
        failures = Failures()
        if not keep_units:
            with failures.kept():
                files = in_step.remove_files()
                removal = dataclasses.replace(removal, removed=(*removal.removed, *files))
        with failures.kept():  # the way out is never barred, and whoever took it needs no way back
            confirm.drop(pending)
        failures.raise_if_any(REMOVED)
        return removal


def remove_everything(
    record: state.State | None, *, dry_run: bool = False, successors: before.Before | None = None
) -> Removal:
    """Take away all that is tpctl's or kumactl's, and the record. To be called under the lock.

    With `successors`, kumactl's rules stand in iptables again, as they did before, beside tpctl's of another engine:
    they and ::6 stay, and by being there let redirected connections go on.
    """
    found = _Everything(record, dry_run=dry_run, successors=successors)
    found.remove_from_files()
    failures = Failures()
    go_through(found.rules(), failures)
    rest = "The rest was removed. " if found.removed and not dry_run else ""
    failures.raise_if_any(f"{rest}Run `tpctl uninstall` again; `tpctl status` shows what is installed now")
    go_through(found.what_rules_needed(), failures)
    notices = (*found.notices, *(found.left if dry_run else finishing.see_to(found.left)))
    failures.raise_if_any(REMOVED)
    return Removal(tuple(found.removed), notices)


class _Everything:
    """All that is there, and the steps that remove it. Each goes as far as it can, whatever became of the others."""

    def __init__(self, record: state.State | None, *, dry_run: bool, successors: before.Before | None) -> None:
        self._engines = registry.holding(record.options if record else None)
        if not self._engines:
            raise HostError("this host has neither nftables nor iptables to look with; install one of them")
        self._record = record
        self._dry_run = dry_run
        self._successors = successors
        self._interface = record.policy.loopback if record else "lo"
        self._is_kumactls = draining.came_with_kumactl(self._interface, self._engines)
        self._in_files: str | None = None
        self.removed: list[str] = []
        self.notices: list[str] = []
        self.left: list[str] = []
        """Notices of what stays for connections that run."""

    def remove_from_files(self) -> None:
        """First of all firewalld's files: a reload would make rules of them again."""
        self._in_files = in_step.remove(self._record, self.removed, dry_run=self._dry_run)
        if not self._dry_run:
            hold_answers(self._record)

    def rules(self) -> list[Step]:
        """The steps that end the redirection."""
        going = [one for one in self._engines if not self._successors or one.name != "iptables"]
        return [
            Step("::6 that came with kumactl is marked", self._mark),
            *(Step(f"the rules of the {one.name} engine", partial(self._remove_rules, one)) for one in going),
        ]

    def what_rules_needed(self) -> list[Step]:
        """The steps after which nothing is left."""
        return [
            Step("::6 on the loopback interface", self._remove_address),
            Step("routes of bound sockets and of TPROXY", self._remove_routes),
            Step("the record", self._forget),
        ]

    def _mark(self) -> None:
        if self._is_kumactls and not self._successors and not self._dry_run:
            loopback.mark(self._interface)

    def _remove_rules(self, engine: Engine[Any]) -> None:
        footprint = self._record.footprints.get(engine.name) if self._record else None
        if self._successors:
            removal = engine.remove(footprint=footprint, draining=False)
        else:
            removal = draining.remove(engine, footprint, dry_run=self._dry_run)
        self.removed += removal.removed
        self.left += removal.notices

    def _remove_address(self) -> None:
        """From which no rule lets the data plane dial any more."""
        if self._successors and self._successors.address:
            return
        gone, running = end_address(self._interface, is_kumactls=self._is_kumactls, dry_run=self._dry_run)
        self.removed += gone
        self.left += running

    def _remove_routes(self) -> None:
        self.removed += end_device_routes(dry_run=self._dry_run)
        gone, running = end_routes(dry_run=self._dry_run)
        self.removed += gone
        self.left += running

    def _forget(self) -> None:
        """What conntrack knows of connections that are over, and the record."""
        from tpctl.change import ended

        if self._in_files:  # the record stays: in other network namespaces, only it tells that the files are about us
            raise ApplyError(self._in_files)
        if self._dry_run:
            return
        ended.forget()
        try:
            state.clear()
        except state.ReadOnlyError as stays:
            self.notices.append(f"warning: {stays}; until the next boot `tpctl status` takes it for a problem")


def flush(*, dry_run: bool = False) -> Removal:
    """Remove every rule and chain of nat and raw, everybody's, in both variants and families of iptables."""
    from tpctl.engines import others

    require_root("tpctl uninstall --flush")
    if dry_run:
        return Removal(tuple(others.everything(FLUSHED_TABLES)))
    ours = uninstall()
    with state.locked(is_way_out=True):
        flushed = others.flush(FLUSHED_TABLES)
    return Removal((*ours.removed, *_unique(flushed, ours.removed)), ours.notices)


def _unique(items: Iterable[str], known: Iterable[str]) -> list[str]:
    seen = set(known)
    return [item for item in items if item not in seen]


def hold_answers(previous: state.State | None) -> None:
    """Before the rules of TPROXY go."""
    if routing.present():
        leftovers.hold_answers(previous.policy if previous else None)


def end_routes(*, dry_run: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """After they went. Hands back what went with them, and notices."""
    running, removed = draining.tidy_answers(dry_run=dry_run)
    return removed, (draining.dialled_run(running),) if running else ()


def end_address(
    name: str, *, is_kumactls: bool = False, dry_run: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take ::6 away if nothing needs it. Hands back what went, and notices."""
    running, gone = draining.tidy_address(name, is_kumactls=is_kumactls, dry_run=dry_run)
    removed = (f"the address ::6 on {name}",) if gone else ()
    return removed, (draining.address_runs(running, name),) if running else ()


def end_device_routes(*, dry_run: bool = False) -> tuple[str, ...]:
    """Take them away, if no connection needs them; until then the table that lets it finish tells of it."""
    return draining.tidy_device_routes(dry_run=dry_run)[1]
