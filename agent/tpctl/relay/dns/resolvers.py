"""The name servers and options of a resolv.conf(5) that may change while the relay runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpctl.host import resolvers
from tpctl.host.resolvers import MAX_RESOLV_CONF, keyword_and_rest
from tpctl.spec.policy import NameServer
from tpctl.system import text
from tpctl.system.input_files import UnusableFileError, read_bytes

RECHECK_SECONDS = 2.0
"""DHCP clients rewrite the file; looking more often would cost a system call a query."""
DEFAULT_TIMEOUT_SECONDS = 2.0
"""Shorter than the 5 s of resolv.conf(5): the client waits that long for the relay, which wants to ask a second one."""
DEFAULT_ATTEMPTS = 2
MAX_TIMEOUT_SECONDS = 30
MAX_ATTEMPTS = 5
"""The caps of resolv.conf(5), RES_MAXRETRANS and RES_MAXRETRY."""

_OPTION = re.compile(r"(timeout|attempts):([0-9]{1,9})", re.ASCII)
"""glibc takes what begins like that (res_setoptions() in resolv/res_init.c)."""


@dataclass(frozen=True, slots=True)
class Resolvers:
    """What a resolv.conf says."""

    servers: tuple[NameServer, ...] = ()
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """How long one server may take to answer."""
    attempts: int = DEFAULT_ATTEMPTS
    """How often each server is asked."""
    rotate: bool = False
    """Each query begins with the next server."""


def parse(content: str) -> Resolvers:
    """The servers and the options timeout, attempts and rotate of a resolv.conf; what makes no sense is skipped.

    >>> parse("nameserver 192.0.2.1\\noptions rotate timeout:1 edns0")
    Resolvers(servers=(NameServer(address=IPv4Address('192.0.2.1'), interface=None),), timeout_seconds=1.0, \
attempts=2, rotate=True)
    """
    timeout, attempts, rotate = DEFAULT_TIMEOUT_SECONDS, DEFAULT_ATTEMPTS, False
    for line in text.lines(content):
        keyword, rest = keyword_and_rest(line)
        for word in text.words(rest) if keyword == "options" else ():
            if word.startswith("rotate"):
                rotate = True
            elif found := _OPTION.match(word):
                number = max(1, int(found[2]))
                if found[1] == "timeout":
                    timeout = float(min(number, MAX_TIMEOUT_SECONDS))
                else:
                    attempts = min(number, MAX_ATTEMPTS)
    return Resolvers(resolvers.parse(content).servers, timeout, attempts, rotate)


class ResolvConf:
    """A file that may change while the relay runs. When it cannot be read, what it said last stays.

    One that was not there from the beginning, or not for this user, is as good as an empty one (resolv/resolv_conf.c).
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = float("-inf")
        self._seen: tuple[int, int, int] | None = None
        self._resolvers = Resolvers()

    def current(self) -> Resolvers:
        """What the file said at most `RECHECK_SECONDS` ago; the same object until it changes."""
        now = self._clock()
        if now - self._checked >= RECHECK_SECONDS:
            self._checked = now
            self._refresh()
        return self._resolvers

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._resolvers = parse(text.decoded(read_bytes(self._path, MAX_RESOLV_CONF)))
                self._seen = seen
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if self._seen is None:
                self._resolvers = parse("")
        except (OSError, UnusableFileError):
            return
