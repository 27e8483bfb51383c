"""The documentation names every command, flag, variable and rule there is.

`python -m tests.unit.test_docs` writes the table of options in docs/commands.md anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tpctl.cli.main import COMMANDS, tpctl
from tpctl.config.options import OPTIONS, Option, Section
from tpctl.config.unsupported import UNSUPPORTED

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BEGIN, END = "<!-- options: begin -->\n", "<!-- options: end -->\n"
RULE_NAME = re.compile(r'ask\("([a-z]\d)"')
ZONE_NAME = re.compile(r"# .*\b(z\d)")
DEFECTS = 24


def option_table() -> str:
    """Every input of a policy, by section, as Markdown."""
    return "\n".join(line for section in Section for line in _section(section))


def _section(section: Section) -> Iterator[str]:
    options = [option for option in OPTIONS if option.section is section]
    if not options:
        return
    yield f"#### {section}\n"
    yield "| Flag | Default | YAML key | Variable (`TPCTL_…`) | Meaning |"
    yield "|---|---|---|---|---|"
    for option in options:
        value = f" {option.metavar}" if option.metavar else ""
        cells = (f"`{option.flag}{value}`", _default(option), f"`{option.key}`", f"`{option.variable}`", option.help)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(option: Option) -> str:
    if option.default in ((), {}, ""):
        return "none"
    if option.flag_negates:
        return f"off (`{option.key}: {str(option.default).lower()}`)"
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return f"{option.default:g}s" if isinstance(option.default, float) else str(option.default)


def with_table(page: str) -> str:
    """A page with the text between the two markers replaced by the table."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, "the markers of the option table are missing"
    return f"{before}{BEGIN}\n{option_table()}\n{END}{after}"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and subcommand, by the words that call it."""
    for name in COMMANDS:
        command = tpctl.get_command(click.Context(tpctl), name)
        assert command is not None
        yield f"tpctl {name}", command
        if isinstance(command, click.Group):
            yield from ((f"tpctl {name} {word}", one) for word, one in command.commands.items())


def flags() -> Iterator[tuple[str, str]]:
    for words, command in commands():
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            yield from ((words, flag) for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--"))


def test_the_option_table_is_that_of_the_code() -> None:
    page = read("docs/commands.md")
    assert page == with_table(page), "write it anew: .venv/bin/python -m tests.unit.test_docs"


def test_every_command_and_flag_is_documented() -> None:
    page = read("docs/commands.md")
    missing = [words for words, _ in commands() if f"`{words}`" not in page and f"{words} " not in page]
    missing += [f"{words} {flag}" for words, flag in flags() if not re.search(rf"`{flag}\b", page)]
    assert not missing


def test_every_command_has_an_example_in_its_help() -> None:
    for words, command in commands():
        text = f"{command.help}\n{command.epilog}"
        assert "Example" in text, words


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.new], ids=lambda option: option.name)
def test_the_migration_page_has_every_input_of_kumactl(option: Option) -> None:
    page = read("docs/kumactl.md")
    for name in (option.flag, option.key, option.variable):
        assert f"`{name}`" in page or f"`{name} " in page, name


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.variable)
def test_the_migration_page_has_what_is_refused(row: object) -> None:
    assert f"`{row.variable}`" in read("docs/kumactl.md")  # type: ignore[attr-defined]


def test_every_rule_of_the_specification_is_explained() -> None:
    source, page = read("agent/tpctl/spec/decide.py"), read("docs/ruleset.md")
    names = {*RULE_NAME.findall(source), *ZONE_NAME.findall(source)}
    assert len(names) > 30
    assert sorted(name for name in names if f"| **{name}** |" not in page) == []


def test_every_defect_of_kumactl_has_its_number() -> None:
    page = read("docs/kumactl.md")
    assert [number for number in range(1, DEFECTS + 1) if f"\n| {number} |" not in page] == []


def _write() -> None:
    page = DOCS / "commands.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _write()
