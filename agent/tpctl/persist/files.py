"""Replacing files that belong to the host's administrator: whole or not at all, and the same but for the content."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from tpctl.system import private_folder
from tpctl.system.errors import ApplyError, HostError
from tpctl.system.input_files import UnusableFileError, read_bytes

SELINUX = "security.selinux"
MAX_SIZE = 64 * 1024 * 1024
"""Bytes of a file that is read whole."""


def read(path: Path) -> bytes | None:
    """The file's bytes, or None when there is none. Raises HostError when it cannot be read."""
    try:
        return read_bytes(path, MAX_SIZE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
    except UnusableFileError as error:
        raise HostError(f"{path} {error}") from error


def replace(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file anew with its mode, owner and SELinux context, synced to disk before it takes the old one's place.

    `mode` is for a file that was not there. A symbolic link stays one, but what it leads to must be a file: a rename
    over /dev/null, to which a link masks a unit, would take that from the whole host. Raises ApplyError; the file is
    then as it was.
    """
    target = path.resolve()
    temporary = None
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, f"{target} is not a file")
        clear_leftovers(target)
        descriptor, temporary = private_folder.new_file(target.parent, _prefix(target))
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            _dress(stream.fileno(), target, mode)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        temporary = None
        sync_folder(target.parent)
    except OSError as error:
        raise ApplyError(f"{path} cannot be written: {error.strerror}; it is unchanged") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> bool:
    """Delete a file; whether it was there. Raises ApplyError."""
    try:
        clear_leftovers(path)
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ApplyError(f"{path} cannot be removed: {error.strerror}") from error
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename or removal in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".tpctl-{target.name}-"


def clear_leftovers(target: Path) -> None:
    """Remove what a tpctl that was killed while it wrote this file has left beside it. Raises OSError."""
    for leftover in target.parent.glob(f"{_prefix(target)}*"):
        leftover.unlink(missing_ok=True)


def _dress(descriptor: int, like: Path, mode: int) -> None:
    try:
        found = like.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, mode)
        return
    os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, found.st_mode & 0o7777)
    with contextlib.suppress(OSError):  # a file system, or a kernel, without SELinux
        os.setxattr(descriptor, SELINUX, os.getxattr(like, SELINUX))
