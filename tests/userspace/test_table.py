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
    rows = [line for line in table(columns, 3).splitlines() if line.startswith("| ")]
    assert rows == ["| | one | two |", "| make dev | passed | failed |", "| nft | 1.0.6 | - |"]


def test_the_document_has_a_table_of_every_release() -> None:
    text = PAGE.read_text()
    assert f"| | {' | '.join(RELEASES)} |" in text
    assert "anything else" in replaced(text, "anything else")
    assert f"| | {' | '.join(RELEASES)} |" not in replaced(text, "anything else")
