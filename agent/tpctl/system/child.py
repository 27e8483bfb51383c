"""Work in a forked child: for C libraries that may crash, keep state of their own, or never come back."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from tpctl.system import text
from tpctl.system.errors import INTERNAL, ApplyError, described
from tpctl.system.runner import TIMEOUT_SECONDS


class ChildFailedError(Exception):
    """The work raised, or the child crashed; the message is what it said, as it said it."""


RULES = "the kernel's rules could not be worked on"
OTHERS_CHANGE = "perhaps because another program changes its own all the time; try again"


def in_child(
    work: Callable[[], str], *, seconds: float = TIMEOUT_SECONDS, what: str = RULES, why: str = OTHERS_CHANGE
) -> str:
    """Run `work` in a forked child and hand back what it returns.

    Raises ChildFailedError with what it raised and printed, ApplyError when it has not ended within `seconds` (it is
    killed; what it had asked of the kernel may have been done). `what` and `why` are the message then.
    """
    # Files, not pipes: nobody has to read them while the child still writes. The pipe tells the end of the child.
    with os.fdopen(os.memfd_create("result"), "w+b") as result, os.fdopen(os.memfd_create("said"), "w+b") as said:
        alive, held = os.pipe()
        child = os.fork()
        if child == 0:
            _work(work, result.fileno(), said.fileno())
        os.close(held)
        ended = _is_readable(alive, seconds)
        os.close(alive)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not ended:
            raise ApplyError(f"{what} within {seconds:g} s, {why}")
        if status == 0:
            return _text(result.fileno())
        raise ChildFailedError(
            _text(said.fileno()).strip() or f"it ended with status {os.waitstatus_to_exitcode(status)}"
        )


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Whether it becomes so in time, the end of a file included. By poll(2): select(2) takes no number above 1023."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _work(work: Callable[[], str], result: int, said: int) -> None:
    """What the child does: it never returns."""
    status = 1
    try:
        os.dup2(said, 2)
        _write(result, work())
        status = 0
    except BaseException as error:  # noqa: BLE001 - handed to the parent as text; nothing may escape a fork
        known = described(error)
        _write(said, f"{error if known.startswith(INTERNAL) else known}\n")
    finally:
        os._exit(status)


def _write(descriptor: int, said: str) -> None:
    left = text.encoded(said)
    while left:
        left = left[os.write(descriptor, left) :]


def _text(descriptor: int) -> str:
    found = b""
    while part := os.pread(descriptor, 1 << 20, len(found)):
        found += part
    return text.decoded(found)
