"""The rooms of the package: who may import whom, as the table of docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "agent"
PACKAGE = SOURCE / "tpctl"
ROW = re.compile(r"^\| `([a-z/]+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def room(module: str) -> str:
    """The folder a module is in; those of the relay and of the command line are rooms of their own.

    >>> room("tpctl.engines.nftables.nft"), room("tpctl.relay.dns.zone"), room("tpctl.system"), room("tpctl")
    ('engines', 'relay/dns', 'system', '')
    >>> room("tpctl.cli.main"), room("tpctl.cli.commands.install")
    ('cli', 'cli/commands')
    """
    words = module.split(".")[1:]
    depth = 2 if words[:1] in (["relay"], ["cli"]) else 1
    is_folder = (PACKAGE / Path(*words)).is_dir()
    return "/".join(words[:depth] if is_folder or len(words) > depth else words[:-1])


def imports(module: str) -> Iterator[str]:
    """Every module of tpctl that a module imports, at its top or in a function."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "tpctl")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where a thing is from"
            if node.module and node.module.split(".")[0] == "tpctl":
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    yield whole if whole in modules() else node.module


@cache
def table() -> dict[str, set[str]]:
    """The rooms and what each may import, by docs/architecture.md."""
    rows = dict(ROW.findall((ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
    found: dict[str, set[str]] = {}
    for name, text in rows.items():
        found[name] = set(found) if "everything" in text else set(re.findall(r"`([a-z/]+)`", text))
    return found


def test_the_table_names_every_room() -> None:
    folders = {room(module) for module in modules()} - {""}
    assert folders == {*table(), "relay"}


def test_a_room_imports_only_rooms_above_it_in_the_table() -> None:
    """So no two rooms import each other, nor any in a circle."""
    above: set[str] = set()
    for name, allowed in table().items():
        assert allowed <= above, f"{name} comes after what it imports"
        above.add(name)


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    own = room(module)
    allowed = {own, "", *table().get(own, ())}
    against = {found for found in imports(module) if room(found) not in allowed}
    assert not against, f"{own} may import {', '.join(sorted(allowed - {own, ''}))}"


@pytest.mark.parametrize("module", [name for name in modules() if room(name) != "engines"])
def test_no_engine_is_imported_from_outside(module: str) -> None:
    """What only one engine knows is asked through the modules beside `base` and `registry`."""
    insides = {found for found in imports(module) if found.startswith("tpctl.engines.") and found.count(".") > 2}
    assert not insides


def test_every_room_says_what_it_is_for() -> None:
    for name in (*table(), "relay"):
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
        assert text, name
        assert "import" in text.lower(), f"{name}/__init__.py says what the room may import"


def test_no_room_hands_on_what_it_imports() -> None:
    """A face that re-exports is a second name for a thing."""
    for name in (*table(), "relay"):
        tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
        assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], name
