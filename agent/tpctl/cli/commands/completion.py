"""`tpctl completion`: what lets a shell complete commands, options and values."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")
EXAMPLE = """\b
Examples:
  source <(tpctl completion bash)
  tpctl completion bash > /etc/bash_completion.d/tpctl
  tpctl completion zsh > /usr/local/share/zsh/site-functions/_tpctl
  tpctl completion fish > /etc/fish/completions/tpctl.fish
"""


@click.command("completion", epilog=EXAMPLE)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script with which a shell completes the words of tpctl.

    It completes values too: engines, modes, users, interfaces and the control groups of units. The Debian and RPM
    packages have these scripts in place.
    """
    from tpctl.cli.complete import completing

    root = context.find_root()
    click.echo(completing.script(shell, root.command, root.info_name or "tpctl"), nl=False)
