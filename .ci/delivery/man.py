"""`python -m delivery.man [FOLDER]`: a man page of every command, from its help. By default into dist/man/man8."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from delivery import DIST, epoch
from tpctl import __version__
from tpctl.cli.main import COMMANDS, tpctl

SECTION = "8"
MANUAL = "System Administration"
ALL = "tpctl"
FILES = (
    ("/etc/tpctl/config.yaml", "The policy that tpctl.service installs at boot; `tpctl install --config` reads it."),
    ("/etc/tpctl/relay.yaml", "Configuration of the relay."),
    ("/run/tpctl", "What is installed, for each network namespace. Nothing is lost without it."),
)
ENVIRONMENT = (
    ("TPCTL_..., KUMA_TRANSPARENT_PROXY_...", "The inputs of a policy; `tpctl install --print-config` names them."),
    ("NO_COLOR, TERM", "No colours are written when the first is set, or the second is `dumb`."),
)
_HEADINGS = {"Exit codes": "Exit status", "Example": "Examples"}
_SUBHEADING = "Options"
_END_OF_OPTIONS = '.\\"'
"""A comment: prose that comes next belongs to a section of its own."""
_BOLD = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z][a-z-]*[a-z])")


def escaped(text: str) -> str:
    """Text as roff takes it; groff(7). What is in backquotes, and flags, are bold."""
    text = text.replace("\\", "\\e")
    text = _BOLD.sub(lambda found: f"\\fB{found[1] or found[2]}\\fR", text).replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def filled(text: str) -> str:
    """A paragraph, in lines of the usual length."""
    lines = textwrap.wrap(escaped(" ".join(text.split())), 78, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


class Page(click.HelpFormatter):
    """Writes what click's commands say of themselves as a man page; man(7)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.nested = False

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The synopsis."""
        self.lines += [".SH SYNOPSIS", f".B {escaped(prog)}", escaped(args)]
        self.lines.append(".SH DESCRIPTION")

    def write_heading(self, heading: str) -> None:
        """A section, or one of the options, which stand together."""
        heading = _HEADINGS.get(heading, heading)
        if self.nested:
            self.lines.append(f".SS {escaped(heading)}")
        else:
            self.lines.append(f".SH {escaped(heading.upper())}")

    def write_paragraph(self) -> None:
        """Between two of click's."""

    def write_text(self, text: str) -> None:
        """Paragraphs; those that begin with \\b are kept as they are, and one that has a heading is a section."""
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
            if not paragraph.lstrip().startswith("\b"):
                self.lines += [*self._break(), filled(paragraph)]
                continue
            first, *rest = paragraph.lstrip("\b \n").splitlines()
            if first.endswith(":") and " " not in first.rstrip(":").replace("Exit codes", ""):
                self.write_heading(first.rstrip(":"))
                self._verbatim(rest)
            else:
                self._verbatim([first, *rest])

    def _break(self) -> list[str]:
        if self.lines[-1].startswith((".SH", ".SS")):
            return []
        return [".PP" if self.lines[-1] != _END_OF_OPTIONS else ".SH NOTES"]

    def _verbatim(self, lines: Sequence[str]) -> None:
        self.lines += [
            *self._break(),
            ".nf",
            *map(escaped, inspect.cleandoc("\n" + "\n".join(lines)).splitlines()),
            ".fi",
        ]

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Flags, or commands, and what they are for."""
        for first, second in rows:
            self.lines += [".TP", f".B {escaped(first)}", filled(second)]

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A heading and what is below it."""
        self.write_heading(name)
        yield

    def options(self, command: click.Command, context: click.Context) -> None:
        """All of them, by section where there are several."""
        inner = Page()
        inner.lines, inner.nested = [".SH OPTIONS"], True
        command.format_options(context, inner)
        headings = [line for line in inner.lines if line.startswith(".SS")]
        if headings[:1] == [f".SS {_SUBHEADING}"]:  # click's own, of commands with one list
            inner.lines.remove(headings[0])
        if len(inner.lines) > 1:
            self.lines += [".SH COMMANDS" if line == ".SS Commands" else line for line in inner.lines]
            self.lines.append(_END_OF_OPTIONS)


def page(name: str, command: click.Command, context: click.Context, brief: str) -> str:
    """The page of one command."""
    made = Page()
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch()))
    made.lines = [
        f'.TH "{escaped(name.upper())}" "{SECTION}" "{date}" "tpctl {__version__}" "{MANUAL}"',
        ".nh",  # a flag that is cut at a hyphen cannot be copied
        ".SH NAME",
        f"{escaped(name)} \\- {escaped(brief)}",
    ]
    command.format_usage(context, made)
    command.format_help_text(context, made)
    made.options(command, context)
    command.format_epilog(context, made)
    if name == ALL:
        for heading, rows in (("Files", FILES), ("Environment", ENVIRONMENT)):
            made.write_heading(heading)
            made.write_dl(rows)
    made.write_heading("See also")
    others = [f"{ALL}-{one}" for one in COMMANDS] if name == ALL else [ALL]
    others += [f"{name}-{one}" for one in command.commands] if isinstance(command, click.Group) and name != ALL else []
    made.lines.append(",\n".join(f".BR {escaped(one)} ({SECTION})" for one in others).replace(",\n", " ,\n"))
    return "\n".join(line for line in made.lines if line) + "\n"


def pages() -> dict[str, str]:
    """Every page, by the name of its file."""
    root = click.Context(tpctl, info_name=ALL, **tpctl.context_settings)
    texts = _below(ALL, tpctl, root, "redirect a host's traffic to a data plane proxy")
    return {f"{name}.{SECTION}": text for name, text in texts}


def _below(name: str, command: click.Command, context: click.Context, brief: str) -> Iterator[tuple[str, str]]:
    yield name, page(name, command, context, brief)
    for word in command.list_commands(context) if isinstance(command, click.Group) else ():
        found = command.get_command(context, word)  # type: ignore[attr-defined]
        inside = click.Context(found, info_name=word, parent=context, **found.context_settings)
        text = COMMANDS[word] if command is tpctl else _as_name(found.get_short_help_str(200))
        yield from _below(f"{name}-{word}", found, inside, text)


def _as_name(sentence: str) -> str:
    """As it stands behind the dash of a NAME section; man-pages(7)."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def write(folder: Path) -> list[Path]:
    """Write them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in sorted(pages().items()):
        written.append(folder / name)
        written[-1].write_text(text, encoding="utf-8")
    return written


if __name__ == "__main__":
    print(*write(Path(sys.argv[1]) if len(sys.argv) > 1 else DIST / f"man/man{SECTION}"), sep="\n")
