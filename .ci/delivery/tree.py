"""The files of a package, laid out below a folder as they will lie on a host."""

from __future__ import annotations

import gzip
import os
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from delivery import CHECKOUT, NAME, epoch, man
from tpctl import __version__
from tpctl.cli.complete import completing
from tpctl.cli.main import tpctl

PACKAGE = CHECKOUT / "agent/tpctl"
EXAMPLE = Path("etc/tpctl/config.yaml.example")
UNITS = Path("usr/lib/systemd/system")
DOCS = Path("usr/share/doc/tpctl")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.md")
_FILE, _PROGRAM, _FOLDER = 0o644, 0o755, 0o755


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a distribution looks for things."""

    modules: Path
    """Python's packages."""
    python: str
    """The interpreter, by its absolute path."""
    zsh: Path


def lay(root: Path, layout: Layout) -> None:
    """Put everything below `root`: the command, its package, units, man pages, completions, documents."""
    shutil.copytree(PACKAGE, root / layout.modules / NAME, ignore=_LEFT_OUT)
    _metadata(root / layout.modules / f"{NAME}-{__version__}.dist-info")
    # -I: what lies in the user's environment and home does not decide what root runs.
    program = f"#!{layout.python} -I\nfrom tpctl.cli.main import main\n\nmain()\n"
    write(root / "usr/bin/tpctl", program, _PROGRAM)
    for unit in (PACKAGE / "persist/units").glob("tpctl*.*"):
        write(root / UNITS / unit.name, unit.read_text(encoding="utf-8"))
    for name, page in man.pages().items():
        write_compressed(root / f"usr/share/man/man{man.SECTION}/{name}.gz", page)
    for shell, place in (
        ("bash", Path("usr/share/bash-completion/completions/tpctl")),
        ("zsh", layout.zsh / "_tpctl"),
        ("fish", Path("usr/share/fish/vendor_completions.d/tpctl.fish")),
    ):
        write(root / place, completing.script(shell, tpctl, NAME))
    write(root / EXAMPLE, Path(__file__).with_name(EXAMPLE.name).read_text(encoding="utf-8"))
    for document in sorted((CHECKOUT / "docs").glob("*.md")):
        write(root / DOCS / document.name, document.read_text(encoding="utf-8"))
    for name in ("schemas", "prometheus"):
        for document in sorted((CHECKOUT / "docs" / name).iterdir()):
            write(root / DOCS / name / document.name, document.read_text(encoding="utf-8"))
    write_compressed(root / DOCS / "CHANGELOG.md.gz", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"))


def settle(root: Path) -> None:
    """Give everything below `root` the modes and the time that do not depend on who builds, and when."""
    when = epoch()
    for path in (root, *everything(root)):
        if not path.is_symlink():
            program = path.is_file() and path.stat().st_mode & 0o100
            path.chmod(_FOLDER if path.is_dir() else _PROGRAM if program else _FILE)
        os.utime(path, (when, when), follow_symlinks=False)


def everything(root: Path) -> Iterator[Path]:
    """Files, links and folders below it, in order."""
    yield from sorted(root.rglob("*"))


def _metadata(folder: Path) -> None:
    """What pip and importlib.metadata read."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {NAME}",
        f"Version: {__version__}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {one}" for one in project["dependencies"]),
    ]
    write(folder / "METADATA", "\n".join(lines) + "\n")
    write(folder / "INSTALLER", "distribution\n")


def write(path: Path, text: str, mode: int = _FILE) -> None:
    """A file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def write_compressed(path: Path, text: str) -> None:
    """The same, by gzip and without a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
