"""`tpctl version`, as kumactl has it; `tpctl --version` for everybody else."""

from __future__ import annotations

import click

from tpctl import __version__

EXAMPLE = """\b
Example:
  tpctl version --json
"""


@click.command("version", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(as_json: bool) -> None:
    """Print the version."""
    from tpctl.cli.printing import output

    if as_json:
        output.as_json("Version", {"version": __version__})
    else:
        click.echo(f"tpctl, version {__version__}")
