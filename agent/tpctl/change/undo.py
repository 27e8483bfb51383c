"""The way back of a change that is being made: what has been done is undone in reverse order, as far as that goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

from tpctl.system.errors import ApplyError, HalfDoneError, HostError, InputError, described

ROLLED_BACK = "Everything was rolled back: the host is as it was before"
INSTALLED_AGAIN = "Everything was rolled back: the policy that was installed before is carried out again"
NOTHING_CHANGED = "Nothing was changed"
REMOVED = "Everything else was removed: no traffic is redirected; `tpctl uninstall` can be run again"
_SAID = (
    "as it was before",
    "tpctl status",
    "as they were before",
    "othing was changed",
    "othing was removed",
    "taken back",
)
"""A failed step may have said itself what the state is."""


class Undo:
    """Collects how to undo each step that has been done."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[], object], bool]] = []
        self._has_changed = False

    def add(self, step: Callable[[], object], *, changes_kernel: bool = True, if_all_went: bool = False) -> None:
        """Undo a step by calling `step`. One that only prepares a change does not count as a change of the host.

        With `if_all_went` it is only undone when everything after it could be: the record of what is half done stays.
        """
        self._steps.append((step, if_all_went))
        self._has_changed |= changes_kernel

    def roll_back(self, error: Exception, outcome: str = ROLLED_BACK) -> NoReturn:
        """Undo everything, then raise what stopped the change, with the host's state now.

        `outcome` describes it for the case that the host had been changed.
        """
        failures: list[str] = []
        is_half_done = isinstance(error, HalfDoneError)
        while self._steps:
            step, if_all_went = self._steps.pop()
            if if_all_went and (failures or is_half_done):
                continue
            try:
                step()
            except Exception as failed:  # noqa: BLE001 - one that fails must not keep the others
                failures.append(described(failed))
        if failures:
            raise ApplyError(
                f"{described(error)}. The rollback failed too: {'; '.join(failures)}. Run `tpctl uninstall`, then look "
                "at `tpctl status`"
            ) from error
        if isinstance(error, InputError | HostError) and not self._has_changed:
            raise error
        said = is_half_done or (any(words in str(error) for words in _SAID) and not self._has_changed)
        state = "" if said else f". {outcome if self._has_changed else NOTHING_CHANGED}"
        raise ApplyError(f"{described(error)}{state}") from error


class Failures:
    """What went wrong in some steps of a change that goes on with the others."""

    def __init__(self) -> None:
        self._said: list[str] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Note what stops the block, and go on behind it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the other steps are still to be done
            self._said.append(described(error))

    def raise_if_any(self, state: str) -> None:
        """Raise ApplyError with everything noted and the host's state now."""
        if self._said:
            raise ApplyError(f"{'; '.join(self._said)}. {state}")
