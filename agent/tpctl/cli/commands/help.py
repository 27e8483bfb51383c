"""`tpctl help`."""

from __future__ import annotations

import click

from tpctl.cli.complete import candidates

EXAMPLE = """\b
Examples:
  tpctl help
  tpctl help install
  tpctl help explain outbound
"""


@click.command("help", epilog=EXAMPLE)
@click.argument("words", nargs=-1, metavar="[COMMAND]...", shell_complete=candidates.commands)
@click.pass_context
def command(context: click.Context, words: tuple[str, ...]) -> None:
    """Explain a command, as its --help does."""
    here = context.find_root()
    for word in words:
        group = here.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"`{here.command_path}` has no commands below it", here)
        _, found, _ = group.resolve_command(here, [word])
        assert found is not None
        here = found.context_class(found, info_name=word, parent=here, **found.context_settings)
    click.echo(here.get_help())
