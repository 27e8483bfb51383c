"""The folder with everything that Envoy reads: for this process's user alone, and for one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from tpctl.envoy.documents import Places
from tpctl.host.users import uid_of
from tpctl.system.errors import HostError, InputError

MODE = 0o700
FILE_MODE = 0o600


def place(named: Path | None, environ: Mapping[str, str]) -> Path:
    """Where the folder is: as it was named, or as systemd has made it for this unit (systemd.exec(5)).

    Raises InputError for a place that is not absolute.
    """
    found = named or Path(environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or Places().folder)
    if not found.is_absolute():
        raise InputError(f"--folder {found}: is not an absolute path")
    return found


def prepare(folder: Path, user: str | None) -> None:
    """Make the folder for a user, by default the present one, or look at one that is there.

    Only root can make one for another user. One that is there is never given away: it could be anything. Raises
    HostError when it cannot be made, or is not that user's own.
    """
    uid = os.geteuid() if user is None else (uid_of(user) or 0)
    try:
        folder.mkdir(mode=MODE)
        os.chown(folder, uid, -1, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(
            f"{folder} cannot be made: {error.strerror}; start as root with --user, let systemd make it "
            "(RuntimeDirectory=), or name another place with --folder"
        ) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid:
        raise HostError(f"{folder} is not a directory of uid {uid}; remove it, or name another place with --folder")
    if stat.S_IMODE(found.st_mode) != MODE:
        folder.chmod(MODE)


class Folder:
    """The folder, held by this process until it ends."""

    def __init__(self, path: Path) -> None:
        """Raises HostError when another process has it."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise HostError(
                f"another tpctl envoy run has {path}; end that one, or give this one another place with --folder"
            ) from None

    def let_go(self) -> None:
        """In a forked process: it does not hold the folder when this one has ended."""
        os.close(self._descriptor)

    def clear(self) -> None:
        """Remove what an earlier process has left: secrets, and a state that is nobody's."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def put(self, name: str, content: bytes) -> None:
        """Have a file with this content, by a rename: whoever reads it finds the old one or the new one whole.

        One that has it already stays as it is. Raises OSError.
        """
        path = self.path / name
        if path.is_file() and path.read_bytes() == content:
            return
        path.parent.mkdir(mode=MODE, parents=True, exist_ok=True)
        # Not in the file's own directory, where Envoy would look at every file that comes.
        waiting = self.path / ".coming"
        descriptor = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        waiting.rename(path)

    def remove(self, name: str) -> None:
        """Take a directory of the folder away, if it is there."""
        shutil.rmtree(self.path / name, ignore_errors=True)


def is_held(path: Path) -> bool:
    """Whether a process holds the folder. Raises OSError when there is none, or it may not be looked at."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
