"""What a change that failed says of the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tpctl.change.undo import ROLLED_BACK, Failures, Undo
from tpctl.system.errors import ApplyError, HostError, InputError, TpctlError


def message(undo: Undo, error: TpctlError | OSError) -> str:
    with pytest.raises(TpctlError) as raised:
        undo.roll_back(error)
    return str(raised.value)


def failing() -> None:
    raise OSError(5, "Input/output error")


def test_steps_are_undone_in_reverse_order() -> None:
    done: list[int] = []
    undo = Undo()
    for number in range(3):
        undo.add(lambda number=number: done.append(number))  # type: ignore[misc]
    assert message(undo, ApplyError("it failed")) == f"it failed. {ROLLED_BACK}"
    assert done == [2, 1, 0]


def test_what_cannot_be_undone_does_not_keep_the_rest() -> None:
    done: list[str] = []
    undo = Undo()
    undo.add(lambda: done.append("first"))
    undo.add(failing)
    said = message(undo, ApplyError("it failed"))
    assert done == ["first"]
    assert "The rollback failed too: Input/output error" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ApplyError("no"), "no. Nothing was changed"),
        (ApplyError("no. The rules are as they were before"), "no. The rules are as they were before"),
        (OSError(28, "No space left on device"), "No space left on device. Nothing was changed"),
    ],
)
def test_preparations_are_no_change(error: TpctlError | OSError, said: str) -> None:
    undo = Undo()
    undo.add(lambda: None, changes_kernel=False)
    assert message(undo, error) == said


@pytest.mark.parametrize("error", [HostError("it lacks something"), InputError(["one", "two"])])
def test_exit_2_means_that_nothing_was_touched(error: TpctlError) -> None:
    with pytest.raises(type(error)) as raised:
        Undo().roll_back(error)
    assert raised.value is error
    undo = Undo()
    undo.add(lambda: None)
    with pytest.raises(ApplyError):
        undo.roll_back(error)


@pytest.mark.parametrize("steps", [[], [failing], [failing, failing]])
def test_failures_are_kept_until_the_end(steps: list[Callable[[], None]]) -> None:
    failures = Failures()
    for step in steps:
        with failures.kept():
            step()
    if not steps:
        failures.raise_if_any("so be it")
        return
    with pytest.raises(ApplyError, match="so be it") as raised:
        failures.raise_if_any("so be it")
    assert str(raised.value).count("Input/output error") == len(steps)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), f"there is not enough memory. {ROLLED_BACK}"),
        (KeyError("x"), f"internal error (KeyError: 'x'). {ROLLED_BACK}"),
        (PermissionError(1, "Operation not permitted", "/run/x"), f"/run/x: Operation not permitted. {ROLLED_BACK}"),
    ],
)
def test_whatever_stops_a_change_it_is_undone(error: Exception, said: str) -> None:
    done: list[str] = []
    undo = Undo()
    undo.add(lambda: done.append("undone"))
    undo.add(_out_of_memory)
    undo.add(lambda: done.append("the last"))
    with pytest.raises(ApplyError) as raised:
        undo.roll_back(error)
    assert done == ["the last", "undone"]
    failed = "The rollback failed too: there is not enough memory. Run `tpctl uninstall`, then look at `tpctl status`"
    assert str(raised.value) == said.replace(ROLLED_BACK, failed)


def _out_of_memory() -> None:
    raise MemoryError
