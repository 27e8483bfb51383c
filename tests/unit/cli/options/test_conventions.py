"""What people expect of any command line: help, versions, colours, suggestions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

import tpctl
from tests.terminal import on_terminal
from tpctl.cli import main
from tpctl.cli.options.conventions import Run
from tpctl.cli.printing import streams
from tpctl.config.options import OPTIONS

COLOUR = "\x1b["
ASKED = ("explain", "outbound", "--to", "10.1.2.3:443", "--kuma-dp-user", "1")
FLAG = re.compile(r"--[a-z][a-z-]+[a-z]")


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", *words]
    environ = {**os.environ, "NO_COLOR": "", "TERM": "xterm", **variables}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=environ)


def on_a_terminal(*words: str, **variables: str) -> str:
    return on_terminal([sys.executable, "-m", "tpctl.cli.main", *words], {"NO_COLOR": "", "TERM": "xterm", **variables})


@pytest.mark.parametrize("words", [("-V",), ("--version",), ("version",)], ids=str)
def test_the_version(words: tuple[str, ...]) -> None:
    assert run(*words).stdout.strip() == f"tpctl, version {tpctl.__version__}"


def test_the_version_as_json() -> None:
    assert json.loads(run("version", "--json").stdout)["version"] == tpctl.__version__


@pytest.mark.parametrize("words", [(), ("install",), ("explain", "outbound")], ids=str)
def test_help_is_what_the_option_says(words: tuple[str, ...]) -> None:
    asked, option = run("help", *words), run(*words, "--help")
    assert (asked.returncode, option.returncode) == (0, 0)
    assert asked.stdout == option.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("instal",), "No such command 'instal'. Did you mean 'install'? See `tpctl --help`"),
        (("unistall", "--dry-run"), "Did you mean 'uninstall'?"),
        (("stauts",), "Did you mean 'status'?"),
        (("explain", "outbuond"), "Did you mean 'outbound'? See `tpctl explain --help`"),
        (("help", "relya"), "Did you mean 'relay'?"),
        (("help", "install", "x"), "`tpctl install` has no commands below it"),
        (("nothing-like-it",), "No such command 'nothing-like-it'; see `tpctl --help`"),
        (("status", "--jso"), "--json"),
    ],
    ids=str,
)
def test_a_mistyped_word_is_answered_with_the_right_one(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_suggestions_are_not_cut() -> None:
    flag = "--redirect-outbound-insert-instead-of-append"
    for wrong in (f"{flag}ed", flag.replace("outbound", "outbuond")):
        assert flag in re.findall(r"--[a-z-]+", run("install", wrong).stderr)[1:]


def test_a_very_long_value_is_cut() -> None:
    said = run("persist", "--root", "/" + "x" * 5000).stderr
    assert len(said) < 400
    assert "does not exist" in said


def commands() -> Iterator[tuple[str, ...]]:
    group = main.tpctl
    for name in main.COMMANDS:
        found = group.get_command(click.Context(group), name)
        assert found is not None
        yield (name,)
        if isinstance(found, click.Group):
            yield from ((name, below) for below in found.commands)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_never_breaks_a_flag(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.tpctl.main([*words, "--help"], prog_name="tpctl", obj=Run(streams.Streams()))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.search(r"--?[a-z-]*-$", line)] == []


def test_no_default_states_the_opposite_of_its_flag() -> None:
    text = " ".join(run("help", "install").stdout.split())
    negating = [option.flag for option in OPTIONS if option.flag_negates]
    assert negating
    for flag in negating:
        own = text[text.index(f"{flag} ") :]
        following = FLAG.search(own, len(flag))
        assert following is not None
        assert "[default" not in own[: following.start()], flag


def test_colours_are_for_terminals() -> None:
    assert COLOUR in on_a_terminal(*ASKED)
    assert COLOUR not in run(*ASKED).stdout


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_terminals_that_want_none(variables: dict[str, str]) -> None:
    assert COLOUR not in on_a_terminal(*ASKED, **variables)
    assert COLOUR in on_a_terminal("--color", "always", *ASKED, **variables)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_option_stands_anywhere_and_wins(is_first: bool) -> None:
    def with_option(value: str) -> tuple[str, ...]:
        return ("--color", value, *ASKED) if is_first else (*ASKED, "--color", value)

    assert COLOUR in run(*with_option("always")).stdout
    assert COLOUR not in on_a_terminal(*with_option("never"))
    assert run(*with_option("blue")).returncode == 2
