"""Keeping a change that awaits confirmation, or taking it back to exactly what stood there before."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

from tpctl.change import confirm, crossing, lifecycle, removal, tracking
from tpctl.change.before import Before, put_back
from tpctl.engines import registry
from tpctl.host.privilege import require_root
from tpctl.persist import in_step
from tpctl.record import state, taken_back
from tpctl.system.errors import ApplyError, InputError, TpctlError, described

ATTEMPTS = 20
_STAYS = "What is installed now stays: `tpctl rollback` tries again, `tpctl uninstall` takes everything away"
PAUSE_SECONDS = 3.0
"""Between attempts of a guardian: nobody else is there to try again."""


class Outcome(NamedTuple):
    """What became of a change."""

    command: str
    now: str
    """What is installed now, in words."""


def keep() -> Outcome:
    """Confirm the pending change. Raises InputError when there is none, or when it was not made completely."""
    require_root("tpctl confirm")
    with state.locked():
        pending, record = confirm.load(), state.load()
        if pending is None:
            raise InputError(
                "no change awaits confirmation; if one did, its time was up and it was taken back: see tpctl status"
            )
        if not _is_made(pending, record):
            raise InputError(
                f"the {pending.command} was interrupted before it was done, or while it was taken back, so there is "
                "nothing to keep: `tpctl rollback` takes it back"
            )
        confirm.drop(pending)
        if pending.command == "uninstall":
            in_step.remove_files()
        return Outcome(pending.command, str(Before(record)))


def take_back(token: str | None = None, *, at_any_rate: bool = False) -> Outcome | None:
    """Go the way back of the pending change; with `token` only if it is still that one. See `restore` for the other.

    Hands back None when there is nothing to take back. Raises what installing and uninstalling raise; the change then
    still awaits its confirmation.
    """
    require_root("tpctl rollback")
    with state.locked(is_way_out=True):
        pending = confirm.load()
        if pending is None or token not in (None, pending.token):
            return None
        outcome = Outcome(pending.command, restore(pending.before, at_any_rate=at_any_rate))
        if token is not None:  # nobody asked for it, and whoever comes back wants to know
            taken_back.remember(outcome.command, outcome.now)
        try:
            confirm.drop(pending)
        except ApplyError as error:
            raise ApplyError(f"the {outcome.command} was taken back; installed now: {outcome.now}. {error}") from error
        return outcome


def take_back_overdue() -> Outcome | None:
    """Do what the guardian of a change did not do in time, if there is one whose guardian is gone.

    Raises ApplyError when it cannot be done; the change then still awaits its confirmation.
    """
    pending = confirm.load()
    if pending is None or not pending.is_overdue:
        return None
    try:
        return take_back(pending.token)
    except TpctlError as error:
        raise ApplyError(
            f"an earlier {pending.command} was not confirmed in time, and to take it back first failed: {error}. "
            "Nothing else was done"
        ) from error


def stand_guard(token: str, seconds: float) -> Outcome | None:
    """Wait, then take the change back unless it was confirmed, as often as it takes. For the guardian."""
    if not confirm.wait(token, seconds):
        return None
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # In the end, to reach the host again is worth more than kumactl's rules, or the record.
            outcome = take_back(token, at_any_rate=attempt == ATTEMPTS)
        except Exception as error:  # out of memory, or a defect of ours: the host is to be reached again all the same
            why = described(error)
            _tell(f"a change that was not confirmed could not be taken back (attempt {attempt} of {ATTEMPTS}): {why}")
            if attempt == ATTEMPTS:
                raise ApplyError(f"the change could not be taken back: {why}") from error
            time.sleep(PAUSE_SECONDS)
            continue
        if outcome:
            _tell(f"the {outcome.command} was not confirmed in time and was taken back; installed now: {outcome.now}")
        return outcome
    return None


def restore(before: Before, *, at_any_rate: bool = False) -> str:
    """Bring back what stood there before, and hand it back in words. To be called under the lock.

    What comes back is in place before what is there now goes. When kumactl's rules cannot be put back, or a policy
    cannot be put on record, what is there now stays and ApplyError is raised; or `at_any_rate` it goes all the same.
    """
    current = state.load()
    if before.record:
        record = dataclasses.replace(before.record, policy=lifecycle.with_current_cgroup(before.record.policy))
        engine = registry.select(record.options).engine
        report = lifecycle.report_of(engine, "it was installed before", record.policy, [])
        renewal = _renewal_if_possible(record) if at_any_rate else None
        lifecycle.carry_out(engine, record, current, report, renewal)
        return str(before)
    renewal = _renewal_if_possible(current) if current else None  # half of what was installed cannot be confirmed
    if not before.holdings:
        removal.remove_everything(current)
        return str(before)
    has_guard = False
    try:
        with tracking.running_connections_known():
            has_guard = current is not None and crossing.runs_programs(current) and crossing.put_guard_aside(current)
            put_back(before, current.footprints.get("iptables") if current else None)
    except Exception as error:
        if at_any_rate:
            removal.remove_everything(current)
            return f"nothing, for {before} could not be put back: {described(error)}"
        if renewal:
            renewal.undo()
        if has_guard:
            crossing.put_guard_back(current)
        raise ApplyError(f"{before} could not be put back: {described(error)}. {_STAYS}") from error
    removal.remove_everything(current, successors=before)
    return str(before)


def _renewal_if_possible(record: state.State) -> state.Renewal:
    """A record on its way; without one where a disk is full or read-only, which must not bar the way back."""
    try:
        return state.begin(record)
    except ApplyError:
        return state.Renewal(state.path(), None, None)


def _is_made(pending: confirm.Pending, record: state.State | None) -> bool:
    """Whether the host is what the change made of it, all of it; of kumactl's rules there is no record to tell."""
    if pending.command == "uninstall":
        from tpctl.engines import snapshot

        return record is None and not (pending.before.holdings and snapshot.take())
    if record is None or record.phase != state.INSTALLED:
        return False
    return pending.command != "install" or record != pending.before.record


def _tell(message: str) -> None:
    """Write to the system log: a guardian has no terminal, and the operator who comes back wants to know."""
    import syslog

    syslog.openlog("tpctl", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, message)
