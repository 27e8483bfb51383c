"""`tpctl check`: whether redirected connections arrive on this host."""

from __future__ import annotations

import click

NOT_AS_IT_SHOULD_BE = 3

EXAMPLE = """\b
Examples:
  tpctl check
  tpctl check --json | jq '.probes[] | select(.fate != "arrived")'

\b
Exit codes: 0 every probe arrived (or nothing is installed), 3 at least one did not.
"""


@click.command("check", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(as_json: bool) -> int:
    """Open one real connection of each direction, family and kind that is redirected, and say how each ended.

    Arrived, refused (nobody listens), lost (and where), or passed by the data plane. They go through all rules of this
    host, tpctl's and others', and through the data plane, between addresses of a temporary veth pair. No packet leaves
    the host, and nothing is left behind.
    """
    from tpctl.cli.options import probing
    from tpctl.cli.printing import output
    from tpctl.host.privilege import require_root
    from tpctl.record import state

    require_root("tpctl check")
    record = state.load()
    if record is None:
        if as_json:
            output.as_json("Check", {"installed": False, "probes": [], "notProbed": []})
        else:
            click.echo("nothing is on record in this network namespace, so there is nothing to check")
        return 0
    report = probing.probed()
    if as_json:
        output.as_json("Check", {"installed": True, **(probing.data(report) or {})})
    else:
        _print(probing.rows(report))
    return NOT_AS_IT_SHOULD_BE if report.astray or report.refused else 0


def _print(rows: list[tuple[str, str]]) -> None:
    from tpctl.cli.printing import output

    output.pairs(rows or [("nothing to probe", "the policy redirects nothing")])
