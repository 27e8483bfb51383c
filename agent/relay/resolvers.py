"""The name servers and options of a resolv.conf(5) that may change while the relay runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.host.resolvers import MAX_RESOLV_CONF, parse_name_servers
from agent.input_files import UnusableFileError, read_bytes
from agent.policy import NameServer

RECHECK_SECONDS = 2.0
"""DHCP clients rewrite the file; looking more often would cost a system call a query."""
DEFAULT_TIMEOUT_SECONDS = 2.0
"""Shorter than the 5 s of resolv.conf(5): the client waits that long for the relay, which wants to ask a second one."""
DEFAULT_ATTEMPTS = 2
MAX_TIMEOUT_SECONDS = 30
MAX_ATTEMPTS = 5
"""The caps of resolv.conf(5), RES_MAXRETRANS and RES_MAXRETRY."""

_OPTION = re.compile(r"(timeout|attempts):([0-9]{1,9})$", re.ASCII)


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


def parse(text: str) -> Resolvers:
    """The servers and the options timeout, attempts and rotate of a resolv.conf; what makes no sense is skipped.

    >>> parse("nameserver 192.0.2.1\\noptions rotate timeout:1 edns0")
    Resolvers(servers=(NameServer(address=IPv4Address('192.0.2.1'), interface=None),), timeout_seconds=1.0, \
attempts=2, rotate=True)
    """
    timeout, attempts, rotate = DEFAULT_TIMEOUT_SECONDS, DEFAULT_ATTEMPTS, False
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] != "options":
            continue
        for word in words[1:]:
            if word == "rotate":
                rotate = True
            elif found := _OPTION.match(word):
                number = max(1, int(found[2]))
                if found[1] == "timeout":
                    timeout = float(min(number, MAX_TIMEOUT_SECONDS))
                else:
                    attempts = min(number, MAX_ATTEMPTS)
    return Resolvers(parse_name_servers(text), timeout, attempts, rotate)


class ResolvConf:
    """A file that may change while the relay runs. When it cannot be read, what it said last stays."""

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
                self._resolvers = parse(read_bytes(self._path, MAX_RESOLV_CONF).decode(errors="replace"))
                self._seen = seen
        except (OSError, UnusableFileError):
            return
