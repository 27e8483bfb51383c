"""A lock file that one process at a time holds, and that goes with it.

Whoever holds the lock may unlink the file. Whoever waited for it then finds that what it has locked is not the file of
that name any more, and begins again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tpctl.system import private_folder
from tpctl.system.errors import ApplyError

POLL_SECONDS = 0.05


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let a lost terminal or Ctrl-C wait until the change is complete or rolled back; programs started inherit it.

    Ctrl-C has nothing left to stop then, so it is dropped: the command goes on to tell how the change ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if signal.SIGINT not in before:
            signal.sigtimedwait({signal.SIGINT}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def acquire(place: Path, wait: float) -> int:
    """A descriptor that holds the lock of a file, which is made if need be, with its folder.

    Raises ApplyError, naming the holder, when it is not free within `wait` seconds; OSError when it cannot be made.
    """

    def opened(place: Path) -> int:
        private_folder.prepare(place.parent)
        return _opened(place)

    return _acquired(place, wait, opened)


def acquire_existing(place: Path, wait: float) -> int | None:
    """The same where no file can be made or changed.

    None when there is no lock that only root can hold: then nobody else can have it, either. Raises ApplyError.
    """
    try:
        return _acquired(place, wait, _as_it_is)
    except (OSError, _NoneError):
        return None


def _acquired(place: Path, wait: float, opened: Callable[[Path], int]) -> int:
    deadline = time.monotonic() + wait
    while True:
        try:
            descriptor = opened(place)
        except FileNotFoundError:  # an uninstall has just removed the directory
            if time.monotonic() >= deadline:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(place, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise ApplyError(_held(place, holder, wait)) from None
            time.sleep(POLL_SECONDS)
        os.close(descriptor)


class _NoneError(Exception):
    """There is no lock that only root can hold."""


def _as_it_is(place: Path) -> int:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _NoneError from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
        return descriptor
    os.close(descriptor)
    raise _NoneError


def _opened(place: Path) -> int:
    """The lock file, which nobody else can open: whoever could would be able to hold the lock for ever."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = place.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                discard(place)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(descriptor).st_nlink <= 1:
            return descriptor
        os.close(descriptor)  # a file that has another name is not ours to write to
        discard(place)


def _held(place: Path, holder: str, wait: float) -> str:
    who = f"another tpctl (process {holder}) has"
    if holder.isdecimal() and not Path("/proc", holder).exists():
        who = f"a program that tpctl (process {holder}, which has ended) had started is still running, and has"
    return f"{who} held {place} for {wait:g} s; nothing was changed"


def _is_still(place: Path, descriptor: int) -> bool:
    """Whether the locked file is the one others will open: an uninstall removes it while it holds the lock."""
    try:
        return os.path.samestat(place.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def discard(thing: Path) -> None:
    """Remove whatever it is; a symbolic link itself, not what it stands for."""
    if thing.is_dir() and not thing.is_symlink():
        import shutil  # here: few commands find such a thing, and it loads every kind of compression

        shutil.rmtree(thing)
    else:
        thing.unlink(missing_ok=True)
