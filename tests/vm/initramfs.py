"""A root file system in memory that holds this Python, bcc, libnftables, this checkout, and what they load."""

from __future__ import annotations

import gzip
import os
import re
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
INTERPRETER = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
_DISTRIBUTION = Path("/usr/lib/python3/dist-packages")
_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
_MODULES = ("pyroute2", "click", "hypothesis", "sortedcontainers", "structlog", "_hypothesis_globals.py")
_NATIVE = (_LIBRARIES / "libbcc.so.0", _LIBRARIES / "libnftables.so.1")
_LOADED_BY_NAME = ("libpthread.so.0", "libdl.so.2", "librt.so.1")
"""What ctypes opens by name; no program is linked to them any more."""
_LEFT_OUT = {"__pycache__", "test", "idlelib", "tkinter", "ensurepip", "config-3.11-x86_64-linux-gnu", ".git", ".venv"}
_EMPTY = ("proc", "sys", "dev", "tmp", "run", "var/cache", "root")


def entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """One file in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(files: Iterable[tuple[str, Path]], own: dict[str, tuple[int, bytes]]) -> bytes:
    """A compressed archive of files (by their place inside) and of `own` ones (mode and content)."""
    parts: list[bytes] = []
    folders: set[str] = set()

    def parents(name: str) -> None:
        for parent in reversed(Path(name).parents):
            if str(parent) not in folders and str(parent) != ".":
                folders.add(str(parent))
                parts.append(entry(str(parent), stat.S_IFDIR | 0o755))

    for name in _EMPTY:
        parents(f"{name}/x")
    for name, path in files:
        parents(name)
        parts.append(entry(name, stat.S_IFREG | (path.stat().st_mode & 0o777), path.read_bytes()))
    for name, (mode, data) in own.items():
        parents(name)
        parts.append(entry(name, mode, data))
    return gzip.compress(b"".join(parts) + entry("TRAILER!!!", 0), 1)


def _tree(root: Path, inside: str) -> Iterator[tuple[str, Path]]:
    for directory, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = Path(directory, name)
            if path.is_file():
                yield f"{inside}/{path.relative_to(root)}", path


def _linked(path: Path) -> Iterator[Path]:
    done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
    yield from map(Path, re.findall(r"(/\S+) \(0x", done.stdout))


def files() -> dict[str, Path]:
    """Everything that is taken from this machine, by its place inside."""
    found: dict[str, Path] = {str(INTERPRETER)[1:]: INTERPRETER}
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    found |= _tree(library, str(library)[1:])
    for name in ("bcc", "nftables"):
        found |= _tree(_DISTRIBUTION / name, str(_DISTRIBUTION / name)[1:])
    for name in _MODULES:
        path = packages / name
        found |= _tree(path, f"packages/{name}") if path.is_dir() else {f"packages/{name}": path}
    for name in ("agent", "tests"):
        found |= _tree(CHECKOUT / name, f"checkout/{name}")
    binaries = [INTERPRETER, *_NATIVE, *(library / "lib-dynload").glob("*.so")]
    linked = {path for binary in binaries for path in _linked(binary)} | {*_NATIVE}
    linked |= {_LIBRARIES / name for name in _LOADED_BY_NAME}
    found |= {str(path)[1:]: path for path in linked if path.exists()}
    return found
