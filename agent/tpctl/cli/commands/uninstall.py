"""`tpctl uninstall`."""

from __future__ import annotations

import click

from tpctl.cli.options.confirming import confirm_option
from tpctl.cli.options.conventions import without_former
from tpctl.system.errors import InputError

EXAMPLE = """\b
Examples:
  tpctl uninstall              remove what tpctl or kumactl installed
  tpctl uninstall --dry-run    only show what would be removed
  tpctl uninstall --flush      the blunt tool: empty nat and raw completely
"""


class UninstallCommand(click.Command):
    """Takes flags of kumactl that have no meaning here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave them out."""
        from tpctl.cli.options import former_flags

        return super().parse_args(ctx, without_former(args, former_flags.UNINSTALL))


@click.command("uninstall", cls=UninstallCommand, epilog=EXAMPLE)
@click.argument("what", required=False, metavar="[transparent-proxy]")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; change nothing.")
@click.option("--flush", is_flag=True, help="Remove EVERY rule and chain of nat and raw, other software's too.")
@click.option("--yes", is_flag=True, help="Do not ask before --flush.")
@click.option("--keep-units", is_flag=True, help="Leave systemd's units: the next boot installs again.")
@confirm_option
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
@click.option("--verbose", is_flag=True, help="List every chain and rule removed.")
@click.option("--finish", is_flag=True, hidden=True, help="Wait for connections that may finish; see change.finishing.")
def command(
    *,
    what: str | None,
    dry_run: bool,
    flush: bool,
    yes: bool,
    keep_units: bool,
    confirm_within: float | None,
    as_json: bool,
    verbose: bool,
    finish: bool,
) -> None:
    """Remove the redirection, leaving nothing behind.

    Needs no configuration, no user and no record: tpctl's and kumactl's rules are recognised by their chains and
    comments, in both variants of iptables and both IP families. Rules of other software keep their place and counters.
    Running it twice is fine.
    """
    from tpctl.change import confirm, removal
    from tpctl.cli.options import confirming
    from tpctl.cli.printing import output, streams

    if finish:
        from tpctl.change import finishing

        finishing.finish()
        return
    if what not in (None, "transparent-proxy"):
        from tpctl.config.values import quoted

        raise InputError(f'uninstall takes no argument but "transparent-proxy": {quoted(what)}')
    if confirm_within is not None and (flush or dry_run):
        raise InputError(f"--confirm-within cannot be combined with {'--flush' if flush else '--dry-run'}")
    if flush and as_json and not (dry_run or yes):
        raise InputError("--flush asks before it removes anything, and with --json it cannot: give --yes or --dry-run")
    if flush and not dry_run and not yes:
        _ask(removal.flush(dry_run=True).removed)
    if flush:
        gone = removal.flush(dry_run=dry_run)
    else:
        gone = removal.uninstall(dry_run=dry_run, confirm_within=confirm_within, keep_units=keep_units)
    if not dry_run:
        streams.done()
    pending = None if confirm_within is None else confirm.load()
    if as_json:
        data = {"dryRun": dry_run, "removed": gone.removed, "notices": gone.notices}
        output.as_json("Uninstall", {**data, "pending": confirming.data(pending)})
        return
    output.notices(gone.notices)
    if not gone.removed:
        click.echo("nothing of tpctl or kumactl is installed; nothing to do")
        return
    if dry_run or verbose:
        for line in gone.removed:
            click.echo(f"{'would remove' if dry_run else 'removed'} {line}")
    if not dry_run:
        click.echo(f"removed: {len(gone.removed)} rules, chains and addresses; everything else is as it was")
    output.pairs(confirming.request(pending))


def _ask(lost: tuple[str, ...]) -> None:
    for line in lost:
        click.echo(f"would remove {line}")
    click.echo("This removes the rules of every other program (Docker, kube-proxy, firewalls) in nat and raw as well.")
    click.confirm("Continue?", abort=True)
