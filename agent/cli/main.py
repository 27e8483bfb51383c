"""The `tpctl` command: finds the subcommand, and turns every error into one message and an exit code.

Nothing heavy is imported here: `tpctl --help` should cost little more than importing click.
"""

from __future__ import annotations

import importlib
import sys
from typing import cast

import click

import agent
from agent.errors import TpctlError

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

EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed, and rolled back
  2  bad input, nothing touched
  3  status, verify: something is not as it should be
"""


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
def tpctl(debug: bool) -> None:
    """Redirect a Linux host's traffic to a data plane proxy, see it, rehearse it, and take it away again.

    \b
    Example:
      tpctl install --kuma-dp-user kuma-dp --exclude-inbound-ports 22
      tpctl status
      tpctl uninstall
    """


def fail(message: str) -> None:
    """Print one error, a line a problem."""
    for line in message.splitlines() or [""]:
        click.echo(f"error: {line}", err=True)


def main() -> None:
    """Entry point; exits with the codes of `EXIT_CODES`."""
    debug = "--debug" in sys.argv[1:]
    try:
        result = tpctl.main(standalone_mode=False)
    except click.exceptions.Abort:
        fail("aborted; nothing was changed")
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except TpctlError as error:
        if debug:
            raise
        fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(1)
    except OSError as error:  # the kernel refused where nothing better can be said
        if debug:
            raise
        fail(f"{error}; `tpctl status` shows what is installed now")
        sys.exit(1)
    except Exception as error:  # the last resort
        if debug:
            raise
        fail(f"internal error ({type(error).__name__}: {error}); run again with --debug for the traceback")
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
