"""docs/security.md names only tests that exist, and has one for every line of its tables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def defined(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_test_it_names_exists() -> None:
    named = TEST.findall(PAGE)
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if name not in defined(ROOT / file)]
    assert missing == []


def test_every_line_of_a_table_names_a_test() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "Shown by" not in line]
    assert len(lines) > 30
    assert [line for line in lines if not TEST.search(line)] == []


def test_everybody_it_speaks_of_has_a_table() -> None:
    for who in ("local user", "application", "remote client", "data plane user", "administrator", "author"):
        assert re.search(rf"^### .*{who}", PAGE, re.MULTILINE), who
