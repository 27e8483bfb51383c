"""What becomes of exceptions that nobody expected: they are counted, and logged on a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.relay.loop.complaints import Complaints

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class Failures:
    """Reports the failures of a loop's handlers; never raises."""

    def __init__(self, log: FilteringBoundLogger, count: Callable[[], None]) -> None:
        """`count` counts one."""
        self._log = log
        self._complaints = Complaints(log)
        self._count = count

    def __call__(self, error: Exception, action: Callable[..., object]) -> None:
        """`action` has raised `error`. The traceback is logged with --debug only."""
        try:
            self._count()
            name = getattr(action, "__qualname__", type(action).__qualname__)
            self._complaints.warn(f"{name} has failed, the relay continues", error=shown(error), at=place(error))
            self._log.debug(f"{name} has failed", exc_info=error)
        except Exception:  # noqa: BLE001, S110 - out of memory, perhaps; whatever it is, there is nobody left to tell
            pass


def shown(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}"


def place(error: BaseException) -> str:
    """Where it was raised, as in "pump.py:115"."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last is not None else "unknown"
