"""Gives memory back to the kernel when many connections have gone.

Allocators keep what is freed for the next ones: malloc all but the end of its heap, Python an arena (1 MB) as long as
anything in it lives. After 9750 connections one worker kept 20 MB, and after 500 with TLS 37 MB, of which next to
nothing was in use.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from tpctl.relay.loop.loop import Loop, Timer

_LOOK_SECONDS = 2.0
_QUIET = 100
"""Connections that end, or come, between two looks, at most, when there is time for this: it takes milliseconds, or a
tenth of a second for a gigabyte."""
_MANY = 64
"""Connections that have gone, at least, when it is worth while."""
_MUCH = 2 * 1024 * 1024
"""Bytes by which the worker has grown, at least, when it is worth while all the same."""
_AGAIN_SECONDS = (12.0, 2.0, 2.0, 2.0, 2.0)
"""Deadlines, and ports that are kept from applications, outlive their connections by some ten seconds, and
what goes then may be kept as well. Each time leaves a few objects, which the next one may find gone: an arena each."""
_STATM = Path("/proc/self/statm")


class Memory:
    """What one worker holds. It is looked at while connections end, and given back once few of them do.

    Never while the worker is busy: it would have to ask for it again.
    """

    def __init__(self, loop: Loop, busy: Callable[[], int], let_go: Callable[[], None]) -> None:
        """`busy` tells how many connections there are; `let_go` drops whatever is only kept for later ones."""
        self._loop = loop
        self._busy = busy
        self._let_go = let_go
        # Of the GNU C library. Looked up once: that leaves garbage behind.
        self._trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _pad: None)
        self._size = resident()
        """Bytes, when memory was last given back."""
        self._most = 0
        """Connections at a time since then."""
        self._seen = 0
        """Connections at the last look."""
        self._ended = 0
        self._is_looking = False
        self._again: Timer | None = None
        self._times = 0
        """How often it was given back for the same connections, while that is going on."""
        self._is_due = False

    def ended(self) -> None:
        """A connection has."""
        self._ended += 1
        if not self._is_looking:
            self._begin_to_look()

    def _begin_to_look(self) -> None:
        self._is_looking = True
        self._seen = self._busy()
        self._most = max(self._most, self._seen + self._ended)
        self._loop.later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        busy = self._busy()
        is_quiet = self._ended <= _QUIET and abs(busy - self._seen) <= _QUIET
        self._ended, self._seen, self._most = 0, busy, max(self._most, busy)
        if not is_quiet:
            self._loop.later(_LOOK_SECONDS, self._look)
            return
        self._is_looking = False
        # What the others have left lies among the connections that are left, and goes when those have gone.
        have_gone = self._most - busy >= _MANY and busy <= self._most // 2
        if have_gone or (busy <= _QUIET and resident() - self._size >= _MUCH):
            self._times = 0
            self._return()
        elif self._is_due:
            self._return()

    def _once_more(self) -> None:
        self._again, self._is_due = None, True
        if not self._is_looking:
            self._begin_to_look()

    def _return(self) -> None:
        self._is_due = False
        if self._again is not None:
            self._again.cancel()
        if self._times < len(_AGAIN_SECONDS):
            self._again = self._loop.later(_AGAIN_SECONDS[self._times], self._once_more)
        self._times += 1
        self._let_go()
        # The cache of attribute lookups keeps the names that were looked up, thousands of them, each in another arena.
        _forget_lookups()
        gc.collect()
        self._trim(0)
        self._most, self._size = self._busy(), resident()
        gc.collect()  # empties the lists of tuples and others that are kept for the next ones: those of this call, too


def _forget_lookups() -> None:
    """Empty the interpreter's cache. Its name is another one from Python 3.13 on, and the old one warns."""
    for name in ("_clear_internal_caches", "_clear_type_cache"):
        if hasattr(sys, name):
            getattr(sys, name)()
            return


def resident() -> int:
    """Bytes of memory that this process has; 0 without /proc."""
    try:
        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
