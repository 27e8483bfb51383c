"""What all commands have in common: options that may stand anywhere, colours, the form of help, and suggestions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tpctl.cli.printing import streams

if TYPE_CHECKING:
    from tpctl.cli.options.former_flags import Former

_NO_BREAK = "\u2011"
"""A hyphen that nothing wraps text at; the help has it only until it is printed."""
MAX_WORD = 100
"""Characters of a mistyped word that are compared; no command is so long."""
_COLOURS = {"auto": None, "always": True, "never": False}
log_format_option = click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="auto: text on a terminal, JSON otherwise.",
)
"""Of the commands that go on running."""


class Run:
    """What the whole command has in common; the object of click's context.

    No dataclass: of what `tpctl --help` imports, only this would need that module.
    """

    def __init__(self, printed: streams.Streams) -> None:
        self.printed = printed
        self.debug = False
        """Whether a failure is told with its traceback."""
        self.problems: list[str] = []
        """What was told to be wrong, without "error: "."""


class Formatter(click.HelpFormatter):
    """Wraps help at blanks only, so that each flag can be read and copied as it is."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The usage line."""
        super().write_usage(prog, _joined(args), prefix)

    def write_text(self, text: str) -> None:
        """A paragraph."""
        super().write_text(_joined(text))

    def write_dl(self, rows: Any, *widths: Any, **more: Any) -> None:
        """Two columns."""
        super().write_dl([(first, _joined(second)) for first, second in rows], *widths, **more)

    def getvalue(self) -> str:
        """What was written."""
        return super().getvalue().replace(_NO_BREAK, "-")


def _joined(text: str) -> str:
    return text.replace("-", _NO_BREAK)


class Context(click.Context):
    """A context whose help is written by `Formatter`."""

    formatter_class = Formatter


class Group(click.Group):
    """A group of commands that knows which one a mistyped word may stand for."""

    context_class = Context

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the words call. Raises UsageError."""
        if args and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            import difflib  # lazily: only a mistake needs it

            word = args[0]
            if word.startswith("-"):  # click says what is wrong with an option
                return super().resolve_command(ctx, args)
            near = difflib.get_close_matches(word[:MAX_WORD].lower(), self.list_commands(ctx), n=1)
            suggestion = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {word!r}.{suggestion}", ctx)
        return super().resolve_command(ctx, args)


def without_former(args: list[str], known: Sequence[Former]) -> list[str]:
    """The words of a command without flags that only kumactl has; says what became of them. Raises InputError."""
    if not any(word.startswith("--") for word in args):
        return args
    from tpctl.cli.options import former_flags
    from tpctl.cli.printing import output

    kept, notices = former_flags.translated(args, known)
    output.notices(notices)
    return kept


def common_options(command: click.Command, *, hidden: bool = True) -> None:
    """Let a command, and each below it, take the options that may stand before the subcommand's name and behind it."""
    command.context_class = Context
    if not any("--debug" in parameter.opts for parameter in command.params):
        command.params += [_debug_option(hidden=hidden), _colour_option(hidden=hidden)]
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        common_options(below)


def _debug_option(*, hidden: bool) -> click.Option:
    def noted(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        run = ctx.find_object(Run)
        if run is not None:  # a command that is called by itself has none
            run.debug |= given

    return _anywhere("--debug", noted, is_flag=True, hidden=hidden, help="Show a traceback when something fails.")


def _colour_option(*, hidden: bool) -> click.Option:
    def noted(ctx: click.Context, _: click.Parameter, given: str | None) -> None:
        if given is not None:
            ctx.color = ctx.find_root().color = _COLOURS[given]

    return _anywhere(
        "--color",
        noted,
        type=click.Choice(list(_COLOURS)),
        hidden=hidden,
        help="Whether to colour the output. auto: on a terminal, unless NO_COLOR is set or TERM is dumb.",
    )


def _anywhere(flag: str, callback: Callable[..., None], **settings: Any) -> click.Option:
    return click.Option([flag], is_eager=True, expose_value=False, callback=callback, **settings)


def default_colour(environ: Mapping[str, str] = os.environ) -> bool | None:
    """False where the environment asks for no colours (no-color.org, TERM=dumb); None leaves it to the stream."""
    return False if environ.get("NO_COLOR") or environ.get("TERM") == "dumb" else None
