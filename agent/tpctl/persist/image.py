"""A file system that is mounted in a folder, as it will look to the system that runs from it.

Its symbolic links are followed as that system will follow them: an absolute one begins at the folder, and none leads
out of it (as openat2(2) does with RESOLVE_IN_ROOT). With the folder / nothing is different from what the kernel does.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tpctl.system.errors import HostError

MAX_LINKS = 40
"""MAXSYMLINKS in include/linux/namei.h."""
_SHEBANG = 256
"""Bytes of which the kernel reads the interpreter's name, BINPRM_BUF_SIZE in include/uapi/linux/binfmts.h."""


def within(root: Path, path: Path | str, *, follow: bool = True) -> Path:
    """Where a path of the image lies; with `follow` off, a link at its very end is left as it is.

    It need not exist. Raises HostError when links lead in a circle.
    """
    found: list[str] = []
    ahead = list(reversed(Path(path).parts))
    links = 0
    while ahead:
        part = ahead.pop()
        if part == "/":
            found.clear()
        elif part == "..":
            del found[-1:]
        elif (ahead or follow) and (link := root.joinpath(*found, part)).is_symlink():
            links += 1
            if links > MAX_LINKS:
                raise HostError(f"{root / Path(path).relative_to(Path(path).anchor)}: too many symbolic links")
            ahead += reversed(link.readlink().parts)
        else:
            found.append(part)
    return root.joinpath(*found)


def shown(root: Path, path: Path | str) -> str:
    """A path of the image for a message: as it is to be found from here."""
    return str(root / Path(path).relative_to(Path(path).anchor))


def cannot_run(root: Path, program: str) -> str | None:
    """Why a program of the image cannot be run there; None when it can, as far as that can be seen from here."""
    where = shown(root, program)
    try:
        file = within(root, program)
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{where} is not a file"
        if not found.st_mode & 0o111:
            return f"{where} is not executable"
        with file.open("rb") as stream:
            beginning = stream.read(_SHEBANG)
    except FileNotFoundError:
        return f"{where} does not exist"
    except OSError as error:
        return f"{where} cannot be read: {error.strerror}"
    words = beginning.partition(b"\n")[0][2:].split() if beginning.startswith(b"#!") else []
    if words and (why := cannot_run(root, os.fsdecode(words[0]))):
        return f"{where} needs an interpreter that is not there: {why}"
    return None
