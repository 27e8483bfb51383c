"""A run of the tests has part of /run for itself: locks, records and names are nobody else's, and go with the run.

So two runs on one machine, or the processes of one, do not wait for each other's /run/xtables.lock; and one that was
killed leaves nothing. What services of the machine have in /run stays where it is;
and the code is there, too, for users who may not look into the folder it is in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from tests.hidden import CODE, OPEN

OWN = frozenset(("tpctl", OPEN.name, "netns", "xtables.lock", "ebtables.lock"))
_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_RUN = Path("/run")


def own_run() -> None:
    """Give this process, and all that it starts, a /run of its own, for good. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    before = os.open(_RUN, os.O_PATH | os.O_DIRECTORY)
    try:
        _mount("tmpfs", str(_RUN), "tmpfs", 0, "mode=755")
        for entry in Path(f"/proc/self/fd/{before}").iterdir():
            if entry.name not in OWN:
                with contextlib.suppress(OSError):  # what root may not look into, nobody needs
                    _show(entry, _RUN / entry.name)
        OPEN.mkdir()
        for number, place in enumerate(CODE):
            _show(place, OPEN / str(number))
    finally:
        os.close(before)


def _show(entry: Path, place: Path) -> None:
    if entry.is_symlink():
        place.symlink_to(entry.readlink())
        return
    place.mkdir() if entry.is_dir() else place.touch()
    _mount(str(entry), str(place), None, _MS_BIND | _MS_REC)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*words, flags, None if data is None else data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)
