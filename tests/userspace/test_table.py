"""The table that goes into the documentation."""

from __future__ import annotations

from pathlib import Path

from tests.userspace.__main__ import Column, replaced, table
from tests.userspace.chroots import CHECKOUT, RELEASES

PAGE = Path(CHECKOUT, "docs/testing.md")


def test_a_release_that_failed_early_has_dashes() -> None:
    columns = [
        Column("one", {"make dev": "passed", "nft": "1.0.6"}),
        Column("two", {"make dev": "failed"}, failed=True),
    ]
    assert table(columns).splitlines() == [
        "| | one | two |",
        "|---|---|---|",
        "| make dev | passed | failed |",
        "| nft | 1.0.6 | - |",
    ]


def test_a_run_of_one_release_replaces_its_column_only() -> None:
    text = PAGE.read_text()
    assert f"| | {' | '.join(RELEASES)} |" in text
    once = replaced(text, [Column("trixie", {"nft": "9.9"})])
    before, after = (_row(each, "nft") for each in (text, once))
    assert after == [*before[:2], "9.9", *before[3:]]
    assert replaced(text, []) == text


def _row(text: str, name: str) -> list[str]:
    (row,) = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |"))
    return row
