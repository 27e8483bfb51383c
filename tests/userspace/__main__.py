"""`python -m tests.userspace [release...]`: every engine with the programs and libraries of other releases. Needs root.

In a chroot of each release: `make dev` from the checkout, what stands there, the unit tests, the tests of installs,
verification, status and uninstalls, those of the engines, and each engine against the specification. The kernel is the
one that runs. With --document, the columns of these releases take the place of those in that file's table.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.equivalence.engines import DOORS
from tests.userspace.chroots import RELEASES, chroot
from tests.userspace.room import Room

PYTHON = ".venv/bin/python"
_NETNS = "tests/netns"
SUITES = {
    "install, verify, status, uninstall": tuple(
        f"{_NETNS}/test_{name}.py"
        for name in ("lifecycle", "verify", "uninstall", "recovery", "cgroup", "confirm", "matrix")
    ),
    "engines": (f"{_NETNS}/engines", f"{_NETNS}/relay/test_sockmap.py"),
    "unit tests": ("tests/unit",),
}
WITHOUT = "legacy tests without python-iptables"
_WITHOUT_FLAGS = ("--without-python-iptables", "-k", "legacy")
_VERSIONS = {
    "Python": (PYTHON, "-c", "import platform; print(platform.python_version())"),
    "nft": ("sh", "-c", r"nft --version | sed 's/.*v\([0-9.]*\).*/\1/'"),
    "iptables": ("sh", "-c", r"iptables --version | sed 's/.*v\([0-9.]*\).*/\1/'"),
    "bcc": (PYTHON, "-c", "import bcc; print(bcc.__version__)"),
    "LLVM": ("sh", "-c", r"ldd /usr/lib/*/libbcc.so.0 | sed -n 's/.*libLLVM[-.a-z]*\([0-9]*\).*/\1/p' | head -1"),
    "pyroute2": (PYTHON, "-c", "from importlib import metadata; print(metadata.version('pyroute2'))"),
    "python-iptables": (PYTHON, "-c", "from importlib import metadata; print(metadata.version('python-iptables'))"),
    "legacy rules by": (PYTHON, "-m", "tests.userspace.way"),
}
_AS_MAKE_TEST = ("--numprocesses", "3", "--dist", "loadfile", "--no-loadscope-reorder")
_SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error|errors)\b")
_EQUIVALENCE = re.compile(r"^(\S+) +(\d+) +(\d+) +(\d+) +[\d.]+$", re.MULTILINE)
_MARK = "<!-- make test-userspace -->"


@dataclass(slots=True)
class Column:
    """What was seen of one release."""

    release: str
    cells: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def examine(release: str, policies: int) -> Column:
    """Everything of one release. What went wrong is printed as a whole."""
    kernel = platform.release().partition("-")[0]
    column = Column(release, {"run": f"N={policies}, Linux {kernel}, {time.strftime('%Y-%m-%d')}"})
    with Room(chroot(release)) as room:
        began = time.monotonic()
        for name, text, failed in itertools.chain(_prepared(room), _examined(room, policies)):
            column.cells[name] = text
            column.failed |= failed
            print(f"{time.monotonic() - began:5.0f} s {release}: {name}: {text}", flush=True)
            if name == "make dev" and failed:
                break
    return column


def _prepared(room: Room) -> Iterator[tuple[str, str, bool]]:
    began = time.monotonic()
    done = room.run("make", "dev")
    if done.returncode:
        print(done.stdout)
    yield (
        "make dev",
        f"{'failed' if done.returncode else 'passed'}, {time.monotonic() - began:.0f} s",
        done.returncode != 0,
    )


def _examined(room: Room, policies: int) -> Iterator[tuple[str, str, bool]]:
    for name, command in _VERSIONS.items():
        done = room.run(*command)
        yield name, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "?", done.returncode != 0
    for door in DOORS:
        done = room.run(PYTHON, "-m", "tests.equivalence", str(policies), "--engine", door)
        found = _EQUIVALENCE.search(done.stdout)
        if done.returncode or not found:
            print(done.stdout)
        text = f"{found[3]} connections, {found[4]} wrong" if found else "failed"
        yield f"{door} against the specification", text, done.returncode != 0
    for name, places in SUITES.items():
        yield (name, *_tested(room, *places))
    yield (WITHOUT, *_tested(room, *_WITHOUT_FLAGS, *SUITES["install, verify, status, uninstall"], *SUITES["engines"]))


def _tested(room: Room, *arguments: str) -> tuple[str, bool]:
    done = room.run(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_AS_MAKE_TEST, *arguments)
    if done.returncode:
        print(done.stdout)
    counts = _SUMMARY.findall(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    return ", ".join(f"{number} {what}" for number, what in counts) or "failed", done.returncode != 0


def table(columns: list[Column]) -> str:
    """Markdown."""
    rows = list(dict.fromkeys(name for column in columns for name in column.cells))
    lines = [
        f"| | {' | '.join(column.release for column in columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(column.cells.get(name, '-') for column in columns)} |" for name in rows),
    ]
    return "\n".join(lines)


def replaced(text: str, columns: list[Column]) -> str:
    """A document with these releases' columns of the table between the two marks replaced; others stay as they are.

    Raises ValueError when it has no such table.
    """
    before, old, after = text.split(_MARK)
    latest = {column.release: column for column in (*_read(old), *columns)}
    return f"{before}{_MARK}\n\n{table(sorted(latest.values(), key=_place))}\n\n{_MARK}{after}"


def _read(text: str) -> list[Column]:
    head, _, *rows = [line.strip("|").split("|") for line in text.split("\n") if line.startswith("|")]
    columns = [Column(release.strip()) for release in head[1:]]
    for name, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            column.cells[name.strip()] = cell.strip()
    return columns


def _place(column: Column) -> int:
    return RELEASES.index(column.release) if column.release in RELEASES else len(RELEASES)


def main() -> int:
    """Run it; 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=RELEASES, help="Debian's names of them")
    parser.add_argument("--policies", type=int, default=20, help="how many, for each engine")
    parser.add_argument("--document", type=Path, help="a file with a table to be replaced")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # rooms are tidied
    columns = [examine(release, arguments.policies) for release in arguments.releases]
    print(f"\n{table(columns)}")
    if arguments.document:
        arguments.document.write_text(replaced(arguments.document.read_text(), columns))
    return 1 if any(column.failed for column in columns) else 0


if __name__ == "__main__":
    sys.exit(main())
