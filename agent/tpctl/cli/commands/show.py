"""`tpctl show`: a picture of what is installed on this host."""

from __future__ import annotations

from pathlib import Path

import click

from tpctl.system.errors import InputError

EXAMPLE = """\b
Examples:
  tpctl show
  tpctl show --mermaid
  tpctl show --svg /tmp/tpctl.svg
"""


@click.command("show", epilog=EXAMPLE)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write it as a drawing; - is stdout.",
)
@click.option("--mermaid", is_flag=True, help="Print it as a flowchart that GitHub, GitLab and many wikis draw.")
def command(svg: Path | None, mermaid: bool) -> None:
    """Show who goes where on this host: clients, applications, the data plane, servers, and what is left alone.

    For a ticket, or to see at a glance what is installed.
    """
    from tpctl.change import status
    from tpctl.cli.commands.status import user_names
    from tpctl.cli.printing import output, picture, picture_svg
    from tpctl.engines.listings import Listings
    from tpctl.host.privilege import require_root

    if svg is not None and mermaid:
        raise InputError("--svg and --mermaid: use only one of them")
    require_root("tpctl show")
    report = status.report(Listings())
    record, found = report.record, report.inspection
    if record is None or not found.installed:
        raise InputError("nothing is installed in this network namespace, or not by a tpctl that is on record")
    by = f"{found.engine} ({found.variant})" if found.variant else found.engine
    title = f"tpctl on this host: {output.family_names(found.families)} by {by}"
    if report.problems:
        title += f"; {len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}, see tpctl status"
    shown = picture.picture(record.policy, found.engine, title, report.ports, user_names(report))
    if svg is None:
        click.echo(picture.as_mermaid(shown) if mermaid else picture.as_text(shown), nl=False)
    elif str(svg) == "-":
        click.echo(picture_svg.as_svg(shown), nl=False)
    else:
        try:
            svg.write_text(picture_svg.as_svg(shown), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--svg: {svg} cannot be written: {error.strerror}") from None
        click.echo(f"wrote {svg}")
