"""Man pages, made from the commands' help."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from delivery import man
from tests.unit.test_docs import commands, flags


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.stem: path for path in man.write(tmp_path_factory.mktemp("man"))}


def plain(page: Path) -> str:
    return page.read_text().replace("\\-", "-")


def test_every_command_and_flag_has_its_place(pages: dict[str, Path]) -> None:
    assert set(pages) == {"tpctl", *(words.replace(" ", "-") for words, _ in commands())}
    missing = [f"{words} {flag}" for words, flag in flags() if flag not in plain(pages[words.replace(" ", "-")])]
    assert not missing
    whole = plain(pages["tpctl"])
    assert not [page for page in pages if page.count("-") == 1 and f".BR {page} (8)" not in whole]
    assert "2  bad input, nothing touched" in whole.partition(".SH EXIT STATUS")[2]


def test_mandoc_finds_nothing_to_complain_of(pages: dict[str, Path]) -> None:
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    words = ["mandoc", "-T", "lint", "-W", "warning", *map(str, pages.values())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_man_shows_them_without_a_warning(pages: dict[str, Path]) -> None:
    if not shutil.which("man"):
        pytest.skip("man is not installed")
    for page in (pages["tpctl"], pages["tpctl-install"], pages["tpctl-explain-outbound"]):
        words = ["env", "LC_ALL=C.UTF-8", "MANWIDTH=80", "MANPAGER=cat", "man", "--warnings", "--local-file", str(page)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "SEE ALSO" in done.stdout
