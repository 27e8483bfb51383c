"""Every page is in the site's navigation, and every link of a page leads to a file and a heading that exist.

`make docs` asks mkdocs, which `make test` does without.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
BLOCK = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@functools.cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """What the headings of a page are linked by, on GitHub and in the site alike."""
    return frozenset(slug(heading) for heading in HEADING.findall(prose(page)))


def slug(heading: str) -> str:
    """The anchor of a heading."""
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", shown).strip().lower())


def navigated(entry: object) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for part in entry.values():
            yield from navigated(part)
    elif isinstance(entry, list):
        for part in entry:
            yield from navigated(part)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / ".ci/mkdocs.yml").read_text(encoding="utf-8"))
    pages, listed = sorted(path.name for path in DOCS.glob("*.md")), sorted(navigated(config["nav"]))
    assert listed == pages, "a page of docs/ belongs into nav of .ci/mkdocs.yml, once"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    here = ROOT / page
    wrong = []
    for link in LINK.findall(prose(here)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = (here.parent / name).resolve() if name else here
        known = there.exists() and (not anchor or anchor in anchors(there))
        if not known or (page.startswith("docs/") and not there.is_relative_to(DOCS)):
            wrong.append(link)
    assert wrong == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 700
