"""Where the kernel shows the network of the calling thread's network namespace.

/sys/class/net shows the namespace that mounted /sys, which after `nsenter --net` is another one; /proc/self/net follows
the process's main thread. /proc/thread-self/net (Linux 3.17) is always right.
"""

from __future__ import annotations

from pathlib import Path

from tpctl.system import text

NET = Path("/proc/thread-self/net")


def read_net(name: str) -> str:
    """A file of /proc/net; empty when the kernel has none of that name (IPv6 turned off, for instance)."""
    try:
        return text.read(NET / name)
    except OSError:
        return ""


def in_first_namespace() -> bool:
    """Whether the network namespace is that of the first process: the one systemd and firewalld manage."""
    try:
        return Path("/proc/1/ns/net").stat().st_ino == Path("/proc/thread-self/ns/net").stat().st_ino
    except OSError:
        return False
