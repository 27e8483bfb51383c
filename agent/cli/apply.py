"""`tpctl apply`."""

from __future__ import annotations

import click

from agent.cli.confirming import confirm_option

EXAMPLE = """\b
Example:
  tpctl status || tpctl apply
"""


@click.command("apply", epilog=EXAMPLE)
@confirm_option
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(as_json: bool, confirm_within: float | None) -> None:
    """Make the kernel hold the recorded policy again, after something else changed or removed its rules.

    Changes nothing, counters included, when the kernel holds exactly that already.
    """
    from agent import lifecycle
    from agent.cli import confirming, output, streams

    confirming.end_overdue(confirm_within)
    report = lifecycle.apply(confirm_within=confirm_within)
    streams.done()
    if as_json:
        pending = confirming.data(report.pending)
        output.as_json(
            {"changed": report.changed, "engine": report.engine, "variant": report.variant, "pending": pending}
        )
        return
    output.notices(report.notices)
    if report.changed:
        variant = f" ({report.variant})" if report.variant else ""
        click.echo(f"repaired: the kernel holds the recorded policy again, by {report.engine}{variant}")
    else:
        click.echo("the kernel holds exactly the recorded policy; nothing was changed")
    output.pairs(confirming.request(report.pending))
