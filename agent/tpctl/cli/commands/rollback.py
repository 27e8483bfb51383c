"""`tpctl rollback`; also what the timer or process behind --confirm-within runs."""

from __future__ import annotations

import click

from tpctl.system.errors import InputError

EXAMPLE = """\b
Example:
  tpctl rollback
"""


@click.command("rollback", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
@click.option("--token", hidden=True, help="Only the change with this token; try until it succeeds.")
@click.option("--wait", type=float, default=0.0, hidden=True, help="Seconds to wait for a confirmation first.")
def command(as_json: bool, token: str | None, wait: float) -> None:
    """Roll back a change that awaits confirmation, without waiting for its deadline.

    This restores what was there before: the previous policy, kumactl's rules, or nothing.
    """
    from tpctl.change import rollback
    from tpctl.cli.printing import output, streams

    outcome = rollback.stand_guard(token, wait) if token else rollback.take_back()
    if outcome is None and not token:
        raise InputError("no change awaits confirmation, so there is nothing to take back")
    streams.done()
    if as_json:
        output.as_json(
            "Rollback", {"takenBack": outcome.command if outcome else None, "now": outcome.now if outcome else None}
        )
    elif outcome:
        click.echo(f"taken back: the {outcome.command}; installed now: {outcome.now}")
