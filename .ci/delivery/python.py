"""The wheel and the source distribution. The latter has the tests, and everything that `make` needs."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from delivery import CHECKOUT, epoch

_BUILD = "import sys, setuptools.build_meta as back_end; print(getattr(back_end, sys.argv[1])(sys.argv[2]))"


def export(folder: Path) -> None:
    """What is committed, without git's own. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["git", "-C", str(CHECKOUT), "archive", "--format=tar", "HEAD"]
    packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    unpack = ["tar", "-C", str(folder), "-xf", "-"]
    subprocess.run(unpack, input=packed, check=True)


def wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a tree, in which it leaves traces. Raises subprocess.CalledProcessError."""
    return _build("build_wheel", source, folder)


def sdist(source: Path, folder: Path) -> Path:
    """Build the source distribution of a tree, likewise."""
    # Not at the top of the repository: setuptools needs it only here.
    shutil.copy(Path(__file__).with_name("MANIFEST.in"), source)
    made = _build("build_sdist", source, folder)
    _settle(made)
    return made


def _build(what: str, source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BUILD, what, str(folder.resolve())],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        umask=0o022,
    )
    return folder / done.stdout.split()[-1]


def _settle(path: Path) -> None:
    """Pack it again without what depends on who builds, and when."""
    unpacked = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=unpacked, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch(), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    path.write_bytes(gzip.compress(unpacked.getvalue(), 9, mtime=0))
