"""A list of steps: done in order, undone in reverse, and what is said of a change that stopped."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.change.steps import Step, carry_out, go_through
from tpctl.change.undo import Failures
from tpctl.system.errors import ApplyError, HalfDoneError, HostError


class Host:
    """Notes what is done to it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, name: str, does: Any = True, **options: Any) -> Step:
        def do() -> Any:
            self.said.append(name)
            if isinstance(does, Exception):
                raise does
            return does

        return Step(name, do, lambda done: self.said.append(f"not {name} ({done})"), **options)


@pytest.fixture
def host() -> Host:
    return Host()


def test_all_steps_are_done_in_order(host: Host) -> None:
    carry_out([host.step("a"), host.step("b"), host.step("c")], "as before")
    assert host.said == ["a", "b", "c"]


def test_what_was_done_is_undone_in_reverse_and_nothing_else(host: Host) -> None:
    """Each undo is given what its step handed back; a step that changed nothing, or failed, has nothing to undo."""
    with pytest.raises(ApplyError, match=r"^no room\. It is as before$"):
        carry_out(
            [host.step("a", 1), host.step("b", 0), host.step("c", 3), host.step("d", ApplyError("no room"))],
            "It is as before",
        )
    assert host.said == ["a", "b", "c", "d", "not c (3)", "not a (1)"]


def test_a_step_that_may_fail_half_way_is_undone_when_it_does(host: Host) -> None:
    with pytest.raises(ApplyError):
        carry_out([host.step("a", ApplyError("no"), may_fail_half_way=True)], "as before")
    assert host.said == ["a", "not a (None)"]


def test_without_a_change_of_the_kernel_nothing_was_changed(host: Host) -> None:
    with pytest.raises(ApplyError, match=r"^no\. Nothing was changed$"):
        carry_out([host.step("a", changes_kernel=False), host.step("b", ApplyError("no"))], "as before")
    with pytest.raises(HostError, match=r"^no tool$"):
        carry_out([host.step("a", changes_kernel=False), host.step("b", HostError("no tool"))], "as before")


def test_an_undo_that_fails_is_said_and_does_not_keep_the_others(host: Host) -> None:
    def fail(_done: object) -> None:
        raise ApplyError("it is stuck")

    with pytest.raises(ApplyError, match=r"^no\. The rollback failed too: it is stuck\. Run `tpctl uninstall`"):
        carry_out([host.step("a"), Step("b", lambda: True, fail), host.step("c", ApplyError("no"))], "as before")
    assert host.said == ["a", "c", "not a (True)"]


def test_the_record_of_what_could_not_be_undone_stays(host: Host) -> None:
    def fail(_done: object) -> None:
        raise ApplyError("it is stuck")

    record = host.step("record", undone_if_all_went=True)
    with pytest.raises(ApplyError, match="The rollback failed too"):
        carry_out([record, Step("b", lambda: True, fail), host.step("c", ApplyError("no"))], "as before")
    assert host.said == ["record", "c"]


def test_the_record_of_a_step_that_stays_half_done_stays(host: Host) -> None:
    record = host.step("record", undone_if_all_went=True)
    steps = [record, host.step("a"), host.step("b", HalfDoneError("no. It could not be taken back"))]
    with pytest.raises(ApplyError, match=r"^no\. It could not be taken back$"):
        carry_out(steps, "as before")
    assert host.said == ["record", "a", "b", "not a (True)"]


def test_errors_that_nobody_foresaw_are_rolled_back_too(host: Host) -> None:
    with pytest.raises(ApplyError, match=r"as before$"):
        carry_out([host.step("a"), host.step("b", MemoryError())], "as before")
    assert host.said[-1] == "not a (True)"


def test_a_removal_goes_as_far_as_it_can(host: Host) -> None:
    failures = Failures()
    go_through([host.step("a", ApplyError("one")), host.step("b"), host.step("c", OSError(5, "two"))], failures)
    assert host.said == ["a", "b", "c"]
    with pytest.raises(ApplyError, match=r"one; .*two.*\. The rest"):
        failures.raise_if_any("The rest")
