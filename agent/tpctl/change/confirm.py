"""Changes that are taken back unless somebody confirms them in time.

Before such a change begins, its way back is written beside the record, and a guardian is started that will go it: a
transient systemd timer where systemd runs this network namespace, a detached process elsewhere. Either has a token;
it acts only while the pending record still carries that token, so a confirmation needs no contact with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tpctl
from tpctl.change import background, before
from tpctl.change.before import Before
from tpctl.record import state
from tpctl.system import runner
from tpctl.system.errors import ApplyError, InputError, TpctlError, described

FORMAT = 1
OVERDUE_SECONDS = 10.0
"""A guardian that has not acted by then is gone."""
_DESCRIPTION = "tpctl takes back a change that was not confirmed"
TIMER, PROCESS = "timer", "process"


class Pending(NamedTuple):
    """A change that awaits its confirmation."""

    command: str
    """ "install", "apply" or "uninstall"."""
    seconds: float
    deadline: float
    """On CLOCK_BOOTTIME, in seconds: it goes on while the host sleeps, and no clock adjustment moves it."""
    token: str
    guardian: str
    before: Before

    @property
    def remaining(self) -> float:
        """Seconds until it is taken back; negative when that is overdue."""
        return self.deadline - _now()

    @property
    def is_overdue(self) -> bool:
        """Whether its guardian is gone: it would have acted by now."""
        return self.remaining < -OVERDUE_SECONDS

    @property
    def unit(self) -> str:
        """The systemd unit of its timer."""
        return f"tpctl-rollback-{self.token}"


def path() -> Path:
    """The pending record's place for this network namespace."""
    return state.path().with_name("pending.json")


def load() -> Pending | None:
    """The change that awaits confirmation, or None."""
    return state.read(path(), _of_document)


def _of_document(document: Mapping[str, Any]) -> Pending:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']} is not known")
    seconds, deadline = float(document["seconds"]), float(document["deadline"])
    if not (math.isfinite(seconds) and math.isfinite(deadline)):
        raise ValueError("its time never comes")
    return Pending(
        command=str(document["command"]),
        seconds=seconds,
        deadline=deadline,
        token=str(document["token"]),
        guardian=str(document["guardian"]),
        before=before.of_document(document["before"]),
    )


def drop(pending: Pending | None) -> None:
    """Forget a pending change, or a record of one that cannot be read: it stays. To be called under the lock.

    Raises ApplyError when the record cannot be removed.
    """
    try:
        if os.path.lexists(path()):  # a read-only disk refuses to remove what is not there, too
            path().unlink(missing_ok=True)
    except OSError as error:
        if pending:
            _dismiss(pending)  # a timer would come all the same
        raise ApplyError(
            f"The record of a change that awaits confirmation, {path()}, cannot be removed: {error.strerror}; see "
            "`tpctl status`"
        ) from error
    with contextlib.suppress(OSError):
        path().parent.rmdir()
    if pending:
        _dismiss(pending)


@contextlib.contextmanager
def guarded(command: str, seconds: float | None, record: state.State | None) -> Iterator[Pending | None]:
    """Make the change of the block one that has to be confirmed within `seconds`; None makes it an ordinary one.

    While one is pending, a further one that has to be confirmed moves the deadline, and the way back stays that of the
    first: to what was last confirmed. Raises InputError for an ordinary one. To be entered under the lock.
    """
    earlier = load()
    if seconds is None:
        if earlier:
            raise InputError(_refusal(earlier))
        yield None
        return
    way_back = earlier.before if earlier else before.take(record)
    armed = _arm(command, seconds, way_back)
    try:
        yield armed
    except TpctlError as error:  # nothing was changed, or it is undone; after anything else the guardian is needed
        try:
            if earlier:
                _write(earlier)
                _dismiss(armed)
            else:
                drop(armed)
        except ApplyError as also:
            raise ApplyError(f"{error}. {also}") from error
        raise
    if earlier:
        _dismiss(earlier)


def wait(token: str, seconds: float) -> bool:
    """Wait as the guardian of a change; whether it still has to be taken back when the time is up."""
    deadline = _now() + seconds
    while (left := deadline - _now()) > 0:
        time.sleep(min(left, 1.0))
        if not _awaits(token):
            return False
    return True


def _awaits(token: str) -> bool:
    """Whether the change with this token still awaits its confirmation.

    That it does not is believed under the lock only: its record is written after its guardian has started, and a later
    change that fails brings the record back.
    """
    if _carries(token):
        return True
    try:
        with state.locked(is_way_out=True):
            return _carries(token)
    except ApplyError:
        return True


def _carries(token: str) -> bool:
    pending = load()
    return pending is not None and pending.token == token


def guardian_argv(token: str) -> list[str]:
    """The command that takes a change back."""
    return background.argv("rollback", "--token", token)


def timer_argv(pending: Pending) -> list[str]:
    """The command that makes systemd run it in time (systemd-run(1))."""
    when = [f"--on-active={round(pending.seconds * 1000)}ms", "--timer-property=AccuracySec=100ms"]
    return background.unit_argv(pending.unit, _DESCRIPTION, when, guardian_argv(pending.token))


def _arm(command: str, seconds: float, way_back: Before) -> Pending:
    """Start the guardian, then write the record: a guardian without a record does nothing, the reverse would hang.

    Raises ApplyError when either cannot be done; the earlier record, if there was one, still counts.
    """
    token = os.urandom(4).hex()
    pending = Pending(command, seconds, _now() + seconds, token, PROCESS, way_back)
    if background.start_unit(timer_argv(pending)):
        pending = Pending(command, seconds, pending.deadline, token, TIMER, way_back)
    try:
        if pending.guardian == PROCESS:
            background.start_process([*guardian_argv(token), "--wait", str(seconds)])
        _write(pending)
    except Exception as error:
        _dismiss(pending)
        raise ApplyError(f"{described(error)}. Nothing was changed") from error
    return pending


def _write(pending: Pending) -> None:
    document = {
        "format": FORMAT,
        "version": tpctl.__version__,
        "command": pending.command,
        "seconds": pending.seconds,
        "deadline": pending.deadline,
        "token": pending.token,
        "guardian": pending.guardian,
        "before": before.document_of(pending.before),
    }
    state.write(path(), document)


def _dismiss(pending: Pending) -> None:
    """Stop a timer that is not needed any more. A process sees by itself that it is not."""
    if pending.guardian == TIMER:
        with contextlib.suppress(FileNotFoundError, TpctlError):
            runner.run(["systemctl", "stop", f"{pending.unit}.timer"])


def _refusal(pending: Pending) -> str:
    return (
        f"a change ({pending.command}) awaits confirmation for another {max(pending.remaining, 0):.0f} s: keep it with "
        "`tpctl confirm`, take it back with `tpctl rollback`, or give --confirm-within to this command too"
    )


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
