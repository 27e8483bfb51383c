"""The commands of the pages print what the pages say."""

from __future__ import annotations

import pytest

from tests.extent import takes_long
from tests.pages.script import ROOT, agrees, needed, played, steps
from tests.pages.stage import is_here, played_apart

IN_SHORT = ("README.md", "docs/tutorial-relay.md", "docs/envoy-tutorial.md", "docs/envoy-gateway.md")


@pytest.mark.root
@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=takes_long) for name in played()]
)
def test_every_command_prints_what_the_page_says(name: str) -> None:
    program = needed((ROOT / name).read_text(encoding="utf-8"))
    if program is not None and not is_here(program):
        pytest.skip(f"{name} needs {program}, which every user may start")
    wrong = _wrong(name)
    assert not wrong, "write it anew: .venv/bin/python -m tests.pages " + name + "\n" + "\n".join(wrong)


def _wrong(name: str) -> list[str]:
    """The commands of a page that printed something else, with what."""
    shown = [(step, printed) for step, printed in played_apart(name) if not step.is_hidden]
    assert shown
    return [f"# {step.command}\n{printed}" for step, printed in shown if not agrees(step.said, printed)]


def test_what_is_compared() -> None:
    assert agrees("took 0.31 s\n", "took 12 s\n")
    assert agrees("since 1 second ago (x)\n", "since just now (x)\n")
    assert agrees("since just now (x)\n", "since 1 minute ago (x)\n")
    assert agrees("one\n…\nfour\n", "one\ntwo\nthree\nfour\n")
    assert not agrees("one\n…\nfour\n", "one\ntwo\nthree\n")
    assert not agrees("installed\n", "not installed\n")


def test_commands_go_on_over_lines() -> None:
    page = "<!-- play -->\n```console\n# cat >x <<'END'\na\nEND\n# echo \\\n  b\nb\nme@client$ c\n```\n"
    assert [(step.command, step.said) for step in steps(page)] == [
        ("cat >x <<'END'\na\nEND", ""),
        ("echo \\\n  b", "b\n"),
        ("c", ""),
    ]
