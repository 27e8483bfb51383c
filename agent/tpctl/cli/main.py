"""The `tpctl` command: finds the subcommand, and turns every error into one message and an exit code.

Nothing heavy is imported here: `tpctl --help` should cost little more than importing click.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, cast

import click

from tpctl import __version__
from tpctl.cli.options.conventions import Group, Run, common_options, default_colour, without_former
from tpctl.cli.printing import streams
from tpctl.system.errors import TpctlError, described

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "install": "redirect this host's traffic to the data plane",
    "uninstall": "remove the redirection, leaving nothing behind",
    "apply": "make the kernel hold the recorded policy again",
    "confirm": "keep a change made with --confirm-within",
    "rollback": "roll such a change back now",
    "persist": "make the redirection survive a reboot, or show whether it will",
    "status": "what is installed, and whether it works",
    "show": "a picture of what is installed: who goes where",
    "check": "whether real connections arrive, and where they are lost",
    "explain": "what happens to one connection, and why",
    "verify": "rehearse a policy on this kernel, in scratch namespaces",
    "relay": "run the small data plane that comes with tpctl",
    "envoy": "use Envoy as the data plane, configured like the relay",
    "top": "watch the relay: connections, bytes, errors, DNS queries",
    "help": "explain a command",
    "completion": "print what lets bash, zsh or fish complete commands and values",
    "version": "print the version",
}
"""Each is the function `command` of the module `tpctl.cli.commands.<name>`, imported only when it is called."""

KUMACTLS = ("--no-config", "--config-file", "--api-timeout")
"""Flags that kumactl has before its commands (`tpctl.cli.options.former_flags`)."""
WATCH_THEIR_OUTPUT = ("top",)
"""Those that print until somebody ends them see for themselves whether anybody still listens."""

EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed, and rolled back
  2  bad input, nothing touched
  3  status, check, verify: there is a problem
"""


COLLECTED_EVERY = 100_000
"""Objects, instead of 700. Nearly everything goes without the garbage collector, and most commands have ended before it
would pay: it took 3 % of an install, and 10 % of one beside 100 000 connections."""
MAX_END = 500
"""Characters that stay at either end of a long message."""
_SEE_STATUS = "`tpctl status` shows what is installed now"


class LazyGroup(Group):
    """A group that imports a subcommand only when it is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave out what kumactl takes before its commands."""
        if args and args[0].partition("=")[0] in KUMACTLS:
            from tpctl.cli.options import former_flags

            args = without_former(args, former_flags.GLOBAL)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The subcommands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tpctl.cli.commands.{cmd_name}")
        command = cast(click.Command, module.command)
        common_options(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The subcommands without importing them, and the options."""
        from click.shell_completion import CompletionItem

        named = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return named + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, "-V", "--version", prog_name="tpctl")
@click.pass_context
def tpctl(ctx: click.Context) -> None:
    """Redirect a Linux host's traffic to a data plane proxy; inspect, rehearse and remove the redirection.

    \b
    Example:
      tpctl install --kuma-dp-user kuma-dp --exclude-inbound-ports 22
      tpctl status
      tpctl uninstall
    """
    if ctx.invoked_subcommand in WATCH_THEIR_OUTPUT:
        cast(Run, ctx.obj).printed.release()


common_options(tpctl, hidden=False)


def fail(run: Run, message: str) -> None:
    """Print one error, a line a problem."""
    for line in message.split("\n"):
        click.echo(f"error: {line}", err=True)
        run.problems.append(line)


def main() -> None:
    """Entry point; exits with the codes of `EXIT_CODES`."""
    gc.set_threshold(COLLECTED_EVERY)
    streams.fill_gaps()
    if "_TPCTL_COMPLETE" in os.environ:
        from tpctl.cli.complete import completing

        completing.register()
    printed = streams.Streams()
    run = Run(printed)
    try:
        code = _run(run)
        if run.problems and _wants_json(sys.argv[1:]):
            from tpctl.cli.printing import output

            output.as_json("Error", {"exitCode": code, "problems": run.problems})
        if (failure := printed.failure()) is not None:
            code = _unprinted(run, code, failure)
    finally:
        printed.release()
    gc.freeze()  # or the interpreter would go through every object once more before it ends: a tenth of a command
    sys.exit(code)


def _wants_json(words: list[str]) -> bool:
    """Whether somebody waits for JSON; the words may be such that click could not read them."""
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _run(run: Run) -> int:
    """Run the command; hands back its exit code."""
    try:
        result = tpctl.main(prog_name="tpctl", standalone_mode=False, obj=run, color=default_colour())
    except click.exceptions.Abort as error:
        # At a question, nothing has been done yet; Ctrl-C may come at any time, also after a change.
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        fail(run, f"interrupted; {_SEE_STATUS}" if interrupted else "aborted; nothing was changed")
        return 1
    except click.ClickException as error:
        _misused(run, error)
        return 2
    except TpctlError as error:
        _trace(run)
        fail(run, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        fail(run, f"interrupted; {_SEE_STATUS}")
        return 1
    except (OSError, MemoryError) as error:  # the kernel refused where nothing better can be said
        _trace(run)
        fail(run, f"{described(error)}; {_SEE_STATUS}")
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: a defect of ours is told like everything else
        _trace(run)
        fail(run, described(error) if run.debug else f"{described(error)}; run again with --debug for the traceback")
        return 1
    return result if isinstance(result, int) else 0


def _trace(run: Run) -> None:
    """Show where the error that is being handled came from, if that was asked for."""
    if run.debug:
        import traceback

        click.echo(traceback.format_exc(), err=True, nl=False)


def _misused(run: Run, error: click.ClickException) -> None:
    """Say on one line what is wrong with the words of the command."""
    message = error.format_message()
    if message.startswith("Usage:"):  # no command at all: its help
        error.show()
        return
    said = _shortened(message).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    help_command = f"see `{context.command_path} --help`" if context else ""
    if help_command:
        said += f" {help_command.capitalize()}" if said.endswith(("?", "?)")) else f"; {help_command}"
    fail(run, said)


def _shortened(message: str) -> str:
    """A message on one line: long words are cut, and of many the middle; suggestions stand at the end."""
    from tpctl.config.values import shown

    line = " ".join(shown(word) for word in message.split())
    return line if len(line) <= 2 * MAX_END else f"{line[:MAX_END]} ... {line[-MAX_END:]}"


def _unprinted(run: Run, code: int, failure: str) -> int:
    """Say that the result could not be printed; hands back the exit code.

    What has been done stands, so that is what the code tells. Where the result is all, it is an error.
    """
    if run.printed.is_report:
        click.echo(f"warning: the result cannot be printed: {failure}; {_SEE_STATUS}", err=True)
        return code
    fail(run, f"the result cannot be printed: {failure}; nothing was changed")
    return 1


if __name__ == "__main__":
    main()
