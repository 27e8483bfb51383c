"""A change is a list of steps, in the order in which they are done; each knows how to do, undo and name itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from tpctl.change.undo import Failures, Undo
from tpctl.system import memory


class Step(NamedTuple):
    """One step of a change."""

    name: str
    """What it is about, in a few words."""
    do: Callable[[], Any]
    """Hands back something true when it has changed anything. Raises what the change raises."""
    undo: Callable[[Any], object] | None = None
    """Brings back what was there before, given what `do` handed back; None when there is nothing to bring back."""
    may_fail_half_way: bool = False
    """Whether `do` may have changed something when it raises: then it is undone too, given None."""
    changes_kernel: bool = True
    """False for one that only prepares a change: when no other step has been done, nothing was changed."""
    undone_if_all_went: bool = False
    """Undone only when all later steps could be: the record of what is half done stays."""


def carry_out(steps: Iterable[Step], outcome: str) -> None:
    """Do all steps or, when one fails, undo those that were done, in reverse order. The last one is the commit point.

    Raises what stopped it as ApplyError, with `outcome` for what the host is like after the rollback; InputError and
    HostError as they are where nothing had been changed.
    """
    undo = Undo()
    with memory.set_aside():
        try:
            for step in steps:
                if step.undo and step.may_fail_half_way:
                    _note(undo, step, None)
                    step.do()
                elif done := step.do():
                    _note(undo, step, done)
        except Exception as error:  # noqa: BLE001 - out of memory, or a defect of ours: nothing half done is left, too
            memory.give_back()
            undo.roll_back(error, outcome)


def _note(undo: Undo, step: Step, done: object) -> None:
    if step.undo:
        back = partial(step.undo, done)
        undo.add(back, changes_kernel=step.changes_kernel, if_all_went=step.undone_if_all_went)


def go_through(steps: Iterable[Step], failures: Failures) -> None:
    """Do each step, whatever becomes of the others: a removal goes as far as it can."""
    for step in steps:
        with failures.kept():
            step.do()
