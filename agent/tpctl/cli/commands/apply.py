"""`tpctl apply`."""

from __future__ import annotations

from typing import Unpack

import click

from tpctl.cli.options.confirming import confirm_option
from tpctl.cli.options.probing import After, probe_options

EXAMPLE = """\b
Example:
  tpctl status || tpctl apply
"""


@click.command("apply", epilog=EXAMPLE)
@confirm_option
@probe_options
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(as_json: bool, **after: Unpack[After]) -> None:
    """Make the kernel hold the recorded policy again, after something else changed or removed its rules.

    Also follows changes on the host since the install: name servers, uids, IPv6 that was turned on. Changes
    nothing, counters included, when the kernel holds exactly that already.
    """
    from tpctl.change import lifecycle
    from tpctl.cli.options import confirming, probing
    from tpctl.cli.printing import output, streams

    confirming.end_overdue(after["confirm_within"])
    report = lifecycle.apply(confirm_within=probing.hold(after))
    streams.done()
    report, arrival = probing.settle(report, after)
    if as_json:
        pending = confirming.data(report.pending)
        document = {"changed": report.changed, "engine": report.engine, "variant": report.variant, "pending": pending}
        output.as_json("Apply", {**document, "arrival": probing.data(arrival)})
        return
    output.notices(report.notices)
    if report.changed:
        variant = f" ({report.variant})" if report.variant else ""
        click.echo(f"repaired: the kernel holds the recorded policy again, by {report.engine}{variant}")
    else:
        click.echo("the kernel holds exactly the recorded policy; nothing was changed")
    output.pairs(confirming.request(report.pending))
    output.notices(probing.warnings(arrival, report.pending, told=True))
