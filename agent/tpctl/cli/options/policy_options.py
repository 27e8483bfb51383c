"""The flags that describe a policy, made from `tpctl.config.options`; install, verify and explain share them.

A command that takes them is written as

    @click.command(cls=PolicyCommand)
    @policy_options
    def command(policy_input: PolicyInput) -> None:
        resolved = load_policy(policy_input)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from tpctl.cli.complete import candidates
from tpctl.config.options import BY_NAME, OPTIONS, Option, Section

if TYPE_CHECKING:
    from tpctl.config.effective import Config
    from tpctl.config.resolve import Resolved

R = TypeVar("R")

_BARE_FLAGS = frozenset(option.flag for option in OPTIONS if option.is_bool)
_ONLY_INSTALL = frozenset({"dry_run"})
_OF_ANY_RUN = frozenset({"config_files", "as_json", "help"})


class PolicyInput(NamedTuple):
    """What the command line said about the policy, not yet read."""

    files: tuple[str, ...]
    flags: Mapping[str, Sequence[str]]
    """By option name, every occurrence as it was typed."""

    @property
    def given(self) -> bool:
        """Whether the command line describes a policy at all."""
        return bool(self.files or set(self.flags) - {"verbose"})

    def load_config(self) -> Config:
        """The configuration of these flags and files and of the environment. Raises InputError."""
        from tpctl.config import load as config  # lazily: --help needs none of it

        return config.load(files=self.files, environ=os.environ, flags=self.flags)


def load_policy(policy_input: PolicyInput) -> Resolved:
    """The policy of the command line, on this host. Raises InputError with every problem."""
    from tpctl.config.resolve import resolve
    from tpctl.host.facts import LiveHost

    return resolve(policy_input.load_config(), LiveHost())


def policy_options(function: Callable[..., R]) -> Callable[..., R]:
    """Give a command every policy flag and --config; it is called with `policy_input` and its own parameters."""
    return _with_options(function, _ONLY_INSTALL)


def install_options(function: Callable[..., R]) -> Callable[..., R]:
    """The same, with the flags that only make sense where something is installed."""
    return _with_options(function, frozenset())


def _with_options(function: Callable[..., R], left_out: frozenset[str]) -> Callable[..., R]:
    options = [option for option in OPTIONS if option.name not in left_out]

    @functools.wraps(function)
    def called(config_files: tuple[str, ...], **parameters: Any) -> R:
        flags = {option.name: parameters.pop(option.name) for option in options}
        given = {name: occurrences for name, occurrences in flags.items() if occurrences}
        return function(policy_input=PolicyInput(config_files, given), **parameters)

    decorated: Callable[..., R] = click.option(
        "--config",
        "config_files",
        multiple=True,
        metavar="FILE",
        shell_complete=candidates.files,
        help="YAML or JSON file with kumactl's keys; - is stdin. Repeatable: the later overrides the earlier.",
    )(called)
    for option in reversed(options):
        # Every value is text here and all occurrences are kept: tpctl.config.load reads them, and reports all problems.
        decorated = click.option(
            option.flag,
            option.name,
            multiple=True,
            metavar=option.metavar or None,
            shell_complete=candidates.of(option),
            help=_help(option),
        )(decorated)
    return decorated


def _help(option: Option) -> str:
    if option.default in ((), {}, "", False) or option.flag_negates:
        return option.help
    default = "true" if option.default is True else str(option.default)
    if isinstance(option.default, float):
        default = f"{option.default:g}s"
    return f"{option.help}  [default: {default}]"


class PolicyCommand(click.Command):
    """A command whose truth values are spelt as in Go (`--x`, `--x=false`) and whose help has sections."""

    own_section: str | None = None
    """The heading of the options that belong to the command itself, when they deserve one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Complete truth values that stand alone, because click would take the next argument for their value."""
        end = args.index("--") if "--" in args else len(args)
        known = {name for parameter in self.params for name in parameter.opts}
        completed = [f"{arg}=true" if arg in _BARE_FLAGS and arg in known else arg for arg in args[:end]]
        return super().parse_args(ctx, completed + args[end:])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by section; those that are no part of a policy come last, or first under `own_section`."""
        sections: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in (*filter(None, [self.own_section]), *Section)
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            option = BY_NAME.get(parameter.name or "")
            own = self.own_section if parameter.name not in _OF_ANY_RUN else None
            section = option.section if option else own or Section.RUN
            if option and option.is_bool:
                record = (option.flag, record[1])
            sections[section].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
