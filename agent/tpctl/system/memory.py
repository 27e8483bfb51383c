"""Room for the way back: memory is set aside before a change, and given back when the change has to be undone.

Where an address space is limited (RLIMIT_AS of getrlimit(2), `ulimit -v`), Python raises MemoryError at any place, and
C libraries that do not expect it crash. So there is to be enough before anything is touched, and some of it is kept for
the rollback, which would otherwise fail for the same reason as the change.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

from tpctl.system.errors import HostError

RESERVE_BYTES = 32 << 20
"""For a rollback: a thread's stack is 8 MiB of it, and programs are started and listings read as in a change."""
NEEDED_BYTES = 2 * RESERVE_BYTES
"""For a change and its rollback."""
_set_aside: list[mmap.mmap] = []


def require() -> None:
    """Raise HostError unless there is room for a change and its way back."""
    if (room := _mapped(NEEDED_BYTES)) is None:
        raise HostError(
            f"there is not enough memory: a change needs {NEEDED_BYTES >> 20} MiB more than this process has now; "
            "is its address space limited (`ulimit -v`)? Nothing was changed"
        )
    room.close()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Keep the reserve during the block, as far as there is any: a change may be a way back itself.

    Whoever begins to undo something calls `give_back` first.
    """
    if (room := _mapped(RESERVE_BYTES)) is not None:
        _set_aside.append(room)
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """Make the reserve free for use; once more does nothing."""
    while _set_aside:
        _set_aside.pop().close()


def _mapped(size: int) -> mmap.mmap | None:
    """So much address space, none of whose pages is ever touched; None when the kernel refuses it."""
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError):
        return None
