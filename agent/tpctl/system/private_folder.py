"""Folders of root's own in which nobody else may do anything: made, made right, or refused."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tpctl.system.input_files import is_others

_UMASK = 0o022


def prepare(folder: Path, mode: int = 0o755) -> None:
    """Make a folder and those above it, or make one that others may change this user's own again.

    What is made has its mode whatever the umask: a record under 077 could not be read by `tpctl explain` without root.
    What others had put into it stays; whoever reads from the folder looks at the files' owners. Raises OSError when it
    is no folder: a symbolic link is not followed.
    """
    before = os.umask(_UMASK)
    try:
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=mode)
    except FileExistsError:
        _make_right(folder, mode)
    finally:
        os.umask(before)


def new_file(folder: Path, prefix: str) -> tuple[int, Path]:
    """A file that was not there before, for its owner alone, and a descriptor to write to it. Raises OSError.

    Nobody's symbolic link is followed. tempfile.mkstemp would do, but loads every kind of compression first.
    """
    while True:
        path = folder / f"{prefix}{os.urandom(8).hex()}"
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path
        except FileExistsError:
            continue


def is_private(folder: Path) -> bool:
    """Whether a folder is there, is no symbolic link, and is this user's own."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and not is_others(found)


def _make_right(folder: Path, mode: int) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        what = "a symbolic link" if folder.is_symlink() else "not a directory"
        raise OSError(errno.ENOTDIR, f"{folder} is {what}; remove it", str(folder)) from None
    try:
        if is_others(os.fstat(descriptor)):
            os.fchown(descriptor, os.geteuid(), os.getegid())  # first: then nobody else can change the mode
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
