"""The `tpctl` command: finds the subcommand, and turns every error into one message and an exit code.

Nothing heavy is imported here: `tpctl --help` should cost little more than importing click.
"""

from __future__ import annotations

import importlib
import sys
from typing import cast

import click

import agent
from agent.cli import streams
from agent.errors import TpctlError, described

COMMANDS = {
    "install": "redirect this host's traffic to the data plane",
    "uninstall": "take the redirection away, leaving nothing behind",
    "apply": "make the kernel hold the recorded policy again",
    "confirm": "keep a change made with --confirm-within",
    "rollback": "take such a change back now",
    "persist": "make the redirection survive a reboot, or see whether it will",
    "status": "what is installed, and whether it works",
    "explain": "what happens to one connection, and why",
    "verify": "rehearse a policy on this kernel, in scratch namespaces",
    "relay": "run the small data plane that comes with tpctl",
    "top": "watch the relay: connections, bytes, errors, DNS queries",
}
"""Each is the function `command` of the module `agent.cli.<name>`, imported only when it is called."""

WATCH_THEIR_OUTPUT = ("relay", "top")
"""Those that run until somebody ends them see for themselves whether anybody still listens."""

EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed, and rolled back
  2  bad input, nothing touched
  3  status, verify: something is not as it should be
"""


_SEE_STATUS = "`tpctl status` shows what is installed now"


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The subcommands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"agent.cli.{cmd_name}")
        return cast(click.Command, module.command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
@click.version_option(agent.__version__, prog_name="tpctl")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def tpctl(ctx: click.Context, debug: bool) -> None:
    """Redirect a Linux host's traffic to a data plane proxy, see it, rehearse it, and take it away again.

    \b
    Example:
      tpctl install --kuma-dp-user kuma-dp --exclude-inbound-ports 22
      tpctl status
      tpctl uninstall
    """
    if ctx.invoked_subcommand in WATCH_THEIR_OUTPUT:
        cast(streams.Streams, ctx.obj).release()


def fail(message: str) -> None:
    """Print one error, a line a problem."""
    for line in message.splitlines() or [""]:
        click.echo(f"error: {line}", err=True)


def main() -> None:
    """Entry point; exits with the codes of `EXIT_CODES`."""
    streams.fill_gaps()
    printed = streams.Streams()
    try:
        code = _run(printed)
        if (failure := printed.failure()) is not None:
            code = _unprinted(code, failure, is_report=printed.is_report)
    finally:
        printed.release()
    sys.exit(code)


def _run(printed: streams.Streams) -> int:
    """Run the command; hands back its exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        result = tpctl.main(prog_name="tpctl", standalone_mode=False, obj=printed)
    except click.exceptions.Abort as error:
        # At a question, nothing has been done yet; Ctrl-C may come at any time, also after a change.
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        fail(f"interrupted; {_SEE_STATUS}" if interrupted else "aborted; nothing was changed")
        return 1
    except click.ClickException as error:
        _misused(error)
        return 2
    except TpctlError as error:
        if debug:
            raise
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        fail(f"interrupted; {_SEE_STATUS}")
        return 1
    except (OSError, MemoryError) as error:  # the kernel refused where nothing better can be said
        if debug:
            raise
        fail(f"{described(error)}; {_SEE_STATUS}")
        return 1
    except Exception as error:  # the last resort
        if debug:
            raise
        fail(f"{described(error)}; run again with --debug for the traceback")
        return 1
    return result if isinstance(result, int) else 0


def _misused(error: click.ClickException) -> None:
    """Say on one line what is wrong with the words of the command."""
    from agent.config_values import shown

    message = error.format_message()
    if message.startswith("Usage:"):  # no command at all: its help
        error.show()
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; see `{context.command_path} --help`" if context else ""
    fail(f"{shown(' '.join(message.split())).rstrip('.')}{hint}")


def _unprinted(code: int, failure: str, *, is_report: bool) -> int:
    """Say that the result could not be printed; hands back the exit code.

    What has been done stands, so that is what the code tells. Where the result is all, it is an error.
    """
    if is_report:
        click.echo(f"warning: the result cannot be printed: {failure}; {_SEE_STATUS}", err=True)
        return code
    fail(f"the result cannot be printed: {failure}; nothing was changed")
    return 1


if __name__ == "__main__":
    main()
