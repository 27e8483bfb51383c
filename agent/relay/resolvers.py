"""The name servers of resolv.conf(5), followed as the file changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from agent.policy import NameServer

RECHECK_SECONDS = 2.0
"""DHCP clients rewrite the file; looking more often would cost a system call a query."""


def parse_resolv_conf(text: str) -> tuple[NameServer, ...]:
    """The name servers in the order of the file; lines that are none, or make no sense, are skipped as glibc does."""
    servers: list[NameServer] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        host, _, interface = words[1].partition("%")
        try:
            server = NameServer(ip_address(host), interface or None)
        except ValueError:
            continue
        if server not in servers:
            servers.append(server)
    return tuple(servers)


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
                self._servers = parse_resolv_conf(self._path.read_text(errors="replace"))
                self._seen = seen
        except OSError:
            return
