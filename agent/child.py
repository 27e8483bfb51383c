"""Work in a forked child: for C libraries that may crash, keep state of their own, or never come back."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from agent.errors import ApplyError
from agent.runner import TIMEOUT_SECONDS


class ChildFailedError(Exception):
    """The work raised, or the child crashed; the message is what it said, as it said it."""


def in_child(work: Callable[[], str], *, seconds: float = TIMEOUT_SECONDS) -> str:
    """Run `work` in a forked child and hand back what it returns.

    Raises ChildFailedError with what it raised and printed, ApplyError when it has not ended within `seconds` (it is
    killed; what it had asked of the kernel may have been done).
    """
    # Files, not pipes: nobody has to read them while the child still writes. The pipe tells the end of the child.
    with os.fdopen(os.memfd_create("result"), "w+b") as result, os.fdopen(os.memfd_create("said"), "w+b") as said:
        alive, held = os.pipe()
        child = os.fork()
        if child == 0:
            _work(work, result.fileno(), said.fileno())
        os.close(held)
        with os.fdopen(alive, "rb") as stream:
            ended, _, _ = select.select([stream], [], [], seconds)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not ended:
            raise ApplyError(
                f"the kernel's rules could not be worked on within {seconds:g} s, perhaps because another program "
                "changes its own all the time; try again"
            )
        if status == 0:
            return _text(result.fileno())
        raise ChildFailedError(
            _text(said.fileno()).strip() or f"it ended with status {os.waitstatus_to_exitcode(status)}"
        )


def _work(work: Callable[[], str], result: int, said: int) -> None:
    """What the child does: it never returns."""
    status = 1
    try:
        os.dup2(said, 2)
        _write(result, work())
        status = 0
    except BaseException as error:  # noqa: BLE001 - handed to the parent as text; nothing may escape a fork
        _write(said, f"{error}\n")
    finally:
        os._exit(status)


def _write(descriptor: int, text: str) -> None:
    left = text.encode(errors="replace")
    while left:
        left = left[os.write(descriptor, left) :]


def _text(descriptor: int) -> str:
    found = b""
    while part := os.pread(descriptor, 1 << 20, len(found)):
        found += part
    return found.decode(errors="replace")
