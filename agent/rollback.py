"""Keeping a change that awaits confirmation, or taking it back to exactly what stood there before."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass

from agent import confirm, lifecycle, state
from agent.before import Before
from agent.engines import registry
from agent.errors import ApplyError, InputError, TpctlError
from agent.host.privilege import require_root
from agent.persist import in_step

ATTEMPTS = 20
PAUSE_SECONDS = 3.0
"""Between attempts of a guardian: nobody else is there to try again."""


@dataclass(frozen=True, slots=True)
class Outcome:
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
        return Outcome(pending.command, _installed(record))


def take_back(token: str | None = None) -> Outcome | None:
    """Go the way back of the pending change; with `token` only if it is still that one.

    Hands back None when there is nothing to take back. Raises what installing and uninstalling raise; the change then
    still awaits its confirmation.
    """
    require_root("tpctl rollback")
    with state.locked():
        pending = confirm.load()
        if pending is None or token not in (None, pending.token):
            return None
        restore(pending.before)
        outcome = Outcome(pending.command, _installed(pending.before.record))
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
            outcome = take_back(token)
        except (TpctlError, OSError) as error:
            _tell(f"a change that was not confirmed could not be taken back (attempt {attempt} of {ATTEMPTS}): {error}")
            if attempt == ATTEMPTS:
                raise ApplyError(f"the change could not be taken back: {error}") from error
            time.sleep(PAUSE_SECONDS)
            continue
        if outcome:
            _tell(f"the {outcome.command} was not confirmed in time and was taken back; installed now: {outcome.now}")
        return outcome
    return None


def restore(before: Before) -> None:
    """Bring back what stood there before. To be called under the lock."""
    current = state.load()
    if before.record is None:
        if current:
            with contextlib.suppress(ApplyError):  # a disk may be full; half of what was installed cannot be confirmed
                state.begin(current)
        lifecycle.remove_everything(current)
        if before.holdings:
            from agent.engines.iptables import snapshot

            snapshot.restore(before.holdings)
        return
    record = dataclasses.replace(before.record, policy=lifecycle.with_current_cgroup(before.record.policy))
    engine = registry.select(record.options).engine
    report = lifecycle.report_of(engine, "it was installed before", record.policy, [])
    lifecycle.carry_out(engine, record, current, report)


def _is_made(pending: confirm.Pending, record: state.State | None) -> bool:
    """Whether the host is what the change made of it, all of it; of kumactl's rules there is no record to tell."""
    if pending.command == "uninstall":
        from agent.engines.iptables import snapshot

        return record is None and not (pending.before.holdings and snapshot.take())
    if record is None or record.phase != state.INSTALLED:
        return False
    return pending.command != "install" or record != pending.before.record


def _installed(record: state.State | None) -> str:
    return f"the policy installed at {record.installed_at}, by {record.options.engine}" if record else "nothing"


def _tell(message: str) -> None:
    """Write to the system log: a guardian has no terminal, and the operator who comes back wants to know."""
    import syslog

    syslog.openlog("tpctl", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, message)
