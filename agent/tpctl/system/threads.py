"""Work in a thread of its own: a network namespace that is entered belongs to the thread, which then ends with it."""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import TypeVar

from tpctl.system.errors import ApplyError

T = TypeVar("T")
WAIT_SECONDS = 15.0


def in_thread(work: Callable[[], T], *, seconds: float = WAIT_SECONDS) -> T:
    """Hand back what `work` returns, or raise what it raises.

    Raises MemoryError when there is no room for a thread, ApplyError when nothing has come of it within `seconds`.
    threading.Thread would wait for ever, in start(), for a thread that runs out of memory before it has begun.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = _thread.allocate_lock()
    ended.acquire()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            errors.append(error)
        finally:
            ended.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:
        raise MemoryError("no room for a thread") from error
    if not ended.acquire(timeout=seconds):
        raise ApplyError(f"the kernel has not let tpctl look into another network namespace within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]
