"""The name servers of a resolv.conf(5) that may change while the relay runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agent.host.resolvers import parse_name_servers
from agent.policy import NameServer

RECHECK_SECONDS = 2.0
"""DHCP clients rewrite the file; looking more often would cost a system call a query."""


class ResolvConf:
    """The servers of a file that may change while the relay runs. A file that cannot be read keeps the last ones."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = float("-inf")
        self._seen: tuple[int, int, int] | None = None
        self._servers: tuple[NameServer, ...] = ()

    def servers(self) -> tuple[NameServer, ...]:
        """The name servers as of at most `RECHECK_SECONDS` ago."""
        now = self._clock()
        if now - self._checked >= RECHECK_SECONDS:
            self._checked = now
            self._refresh()
        return self._servers

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._servers = parse_name_servers(self._path.read_text(errors="replace"))
                self._seen = seen
        except OSError:
            return
