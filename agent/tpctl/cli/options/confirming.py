"""The option --confirm-within of commands that change the kernel, and how they speak of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tpctl.change.confirm import Pending

F = TypeVar("F", bound=Callable[..., Any])
LONGEST_SECONDS = 24 * 3600.0


def duration(text: str) -> float:
    """The seconds of a time such as 60s or 5m. A bare number is refused: kumactl takes those for nanoseconds."""
    from tpctl.config.values import BadValueError, quoted, read_duration, whole_number

    try:
        seconds = 0.0 if whole_number(text) is not None else read_duration(text, lambda note: None)
    except BadValueError as bad:
        raise click.BadParameter(str(bad)) from None
    if not 1 <= seconds <= LONGEST_SECONDS:
        raise click.BadParameter(f"{quoted(text)} is not a time from 1s to 24h, with its unit")
    return seconds


def confirm_option(function: F) -> F:
    """Give a command --confirm-within; it is called with `confirm_within`, seconds or None."""
    return click.option(
        "--confirm-within",
        type=duration,
        metavar="DURATION",
        help="Roll the change back after 60s, 5m, ... unless `tpctl confirm` comes in time.",
    )(function)


def end_overdue(within: float | None) -> None:
    """Take an earlier change back that its guardian should have taken back, and say so on stderr.

    Not before one that has to be confirmed itself: that takes over the way back of the earlier one.
    """
    from tpctl.change import rollback
    from tpctl.cli.printing import output

    if within is None and (outcome := rollback.take_back_overdue()):
        output.notices(
            [
                f"an earlier {outcome.command} was not confirmed in time, and its guardian is gone: it was taken back "
                f"first; installed then: {outcome.now}"
            ]
        )


def request(pending: Pending | None) -> list[tuple[str, str]]:
    """The row that asks for a confirmation."""
    if pending is None:
        return []
    left = max(pending.remaining, 0)
    return [("to keep it", f"tpctl confirm, within {left:.0f} s; otherwise the {pending.command} is taken back")]


def data(pending: Pending | None) -> dict[str, object] | None:
    """The same for JSON."""
    if pending is None:
        return None
    return {"command": pending.command, "remainingSeconds": round(pending.remaining, 1), "by": pending.guardian}
