"""Whether files have changed: by looking at them now and again, which sees every way of changing one.

inotify(7) would have to be told of every directory and link on the way to a file, and sees nothing of a network's file
systems. A look costs some 5 µs a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tpctl.relay.loop.loop import Loop

LOOK_SECONDS = 0.25
Look = tuple[int, int, int, int] | None
"""What differs when a file's content does; None of a file that is not there."""


def looks(paths: Iterable[Path]) -> dict[Path, Look]:
    """What is to be seen of files now."""
    return {path: _look(path) for path in paths}


def _look(path: Path) -> Look:
    try:
        found = os.stat(path)  # noqa: PTH116 - many times a second
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Watch:
    """Calls `changed` when files have changed, and have then been left alone for one look.

    A certificate and its key are two files, and a file may be written in several goes.
    """

    def __init__(self, loop: Loop, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._paths: tuple[Path, ...] = ()
        self._known: tuple[Look, ...] = ()
        self._moving: tuple[Look, ...] | None = None
        loop.every(LOOK_SECONDS, self._look)

    def look_at(self, paths: tuple[Path, ...], before: Mapping[Path, Look] | None = None) -> None:
        """Watch these files from now on. `before` is what was seen of some before they were read: see `looks`."""
        self._paths = paths
        known = {**looks(paths), **(before or {})}
        self._known = tuple(known[path] for path in paths)
        self._moving = None

    def looks(self) -> dict[Path, Look]:
        """What is to be seen of the watched files now."""
        return looks(self._paths)

    def _look(self) -> None:
        now = tuple(self.looks().values())
        if now == self._known:
            self._moving = None
        elif now == self._moving:
            self._known, self._moving = now, None
            self._changed()
        else:
            self._moving = now
