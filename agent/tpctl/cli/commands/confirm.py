"""`tpctl confirm`."""

from __future__ import annotations

import click

EXAMPLE = """\b
Example:
  tpctl install --config /etc/tpctl/config.yaml --confirm-within 60s
  (open a second ssh session, check that everything works)
  tpctl confirm
"""


@click.command("confirm", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(as_json: bool) -> None:
    """Keep a change that was made with --confirm-within."""
    from tpctl.change import rollback
    from tpctl.cli.printing import output, streams

    outcome = rollback.keep()
    streams.done()
    if as_json:
        output.as_json("Confirm", {"confirmed": outcome.command})
    else:
        click.echo(f"confirmed: the {outcome.command} stays")
