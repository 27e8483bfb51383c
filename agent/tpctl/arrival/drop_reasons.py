"""Why the kernel drops packets outside netfilter: its tracepoint `skb:kfree_skb`, which gives reasons since Linux 5.17.

It is listened to in an instance of tracefs of our own (Documentation/trace/ftrace.rst, "Instances"), by a mount that
nobody else sees, and only to what the kernel drops while this thread runs: a packet over lo or a veth pair goes the
whole way in the context of who sends it. So what others trace is left alone, and what others lose is not heard.
Instances outlive the process that made them: the next one removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tpctl.spec.policy import Family
from tpctl.system import text

PREFIX = "tpctl-"
"""What the names of our instances begin with."""
_EVENT = "events/skb/kfree_skb"
_ETHERTYPES = {0x0800: Family.IPV4, 0x86DD: Family.IPV6}
_LINE = re.compile(r" kfree_skb: .*protocol=(\d+) location=(\S+) reason: (\w+)")
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CREATE = 1, 6
"""Numbers of system calls, the same on every architecture, and FSCONFIG_CMD_CREATE (linux/mount.h); Linux 5.2."""
_BUFFER_KILOBYTES = 1410
"""Of an instance, a processor, at once (trace_buf_size in kernel/trace/trace.c)."""
_SHARE_OF_MEMORY = 32
_FIRST_PIDS = 0xEFFFFFFC
"""The inode of the first PID namespace, PROC_PID_INIT_INO (include/linux/proc_ns.h)."""


class NoReasonsError(Exception):
    """The kernel gives none, or not to us."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A packet that was dropped."""

    family: Family
    reason: str
    """Of enum skb_drop_reason, include/net/dropreason-core.h."""
    function: str
    """Which function of the kernel let it go."""


class DropReasons:
    """While it is open, drops are heard. A context manager."""

    def __init__(self) -> None:
        """Raises NoReasonsError."""
        self._held = contextlib.ExitStack()
        try:
            if Path("/proc/self/ns/pid").stat().st_ino != _FIRST_PIDS:
                raise NoReasonsError("tracefs names processes as the first PID namespace does, and this is another one")
            if not _is_affordable():
                raise NoReasonsError("the buffers would take too much of this host's memory")
            self._held.enter_context(self._begun())
        except OSError as error:
            self._held.close()
            raise NoReasonsError(error.strerror) from error
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # whoever comes next removes it
            self._held.close()

    def read(self) -> tuple[Drop, ...]:
        """What was dropped up to now."""
        try:
            listing = (self._instance / "trace").read_text(encoding="ascii", errors="replace")
        except OSError:
            return ()
        return tuple(parse(listing))

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        with _mounted() as root:
            self._instance = root / "instances" / f"{PREFIX}{os.getpid()}"
            with contextlib.ExitStack() as held:
                with _locked(root / "instances", wait=True):  # or it would be removed before it is held
                    _remove_left_over(root / "instances")
                    self._instance.mkdir()
                    held.callback(self._instance.rmdir)
                    held.enter_context(_locked(self._instance))
                if " reason;" not in (self._instance / _EVENT / "format").read_text(encoding="ascii"):
                    raise NoReasonsError("this kernel does not say why it drops packets")
                kinds = " || ".join(f"protocol == {number}" for number in _ETHERTYPES)
                mine = f"common_pid == {threading.get_native_id()} && ({kinds})"
                (self._instance / _EVENT / "filter").write_text(mine, encoding="ascii")
                (self._instance / _EVENT / "enable").write_text("1", encoding="ascii")
                yield


def parse(listing: str) -> Iterator[Drop]:
    """The drops in the file `trace` of an instance. Pure."""
    for line in text.lines(listing):
        if (found := _LINE.search(line)) and (family := _ETHERTYPES.get(int(found[1]))):
            yield Drop(family, found[3], found[2].partition("+")[0])


def remove_left_over() -> None:
    """Remove the instances of processes that were killed. Does nothing where there is no tracefs for us."""
    with contextlib.suppress(OSError), _mounted() as root, _locked(root / "instances", wait=True):
        _remove_left_over(root / "instances")


def _remove_left_over(instances: Path) -> None:
    for left in instances.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            with _locked(left):
                pass
            left.rmdir()


@contextlib.contextmanager
def _locked(instance: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an instance, which no other process then removes, or the directory of all, in which then nothing changes.

    Raises BlockingIOError when somebody else holds it, unless told to `wait`.
    """
    held = os.open(instance, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(held)


@contextlib.contextmanager
def _mounted() -> Iterator[Path]:
    """The kernel's tracefs by a mount that is in no directory, whatever is mounted elsewhere. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as undo:
        made = _checked(libc.syscall(_FSOPEN, b"tracefs", _CLOEXEC))
        undo.callback(os.close, made)
        _checked(libc.syscall(_FSCONFIG, made, _CREATE, None, None, 0))
        mount = _checked(libc.syscall(_FSMOUNT, made, _CLOEXEC, 0))
        undo.callback(os.close, mount)
        yield Path(f"/proc/self/fd/{mount}")


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number or errno.ENOSYS, os.strerror(number or errno.ENOSYS))
    return result


def _is_affordable() -> bool:
    """Whether the buffers are little beside what is free."""
    listing = Path("/proc/meminfo").read_text(encoding="ascii")
    free = re.search(r"^MemAvailable: *(\d+) kB", listing, re.MULTILINE)
    needed = _BUFFER_KILOBYTES * (os.cpu_count() or 1)
    return free is not None and needed * _SHARE_OF_MEMORY < int(free[1])
