"""By which port of this host the caller's ssh session came in, so that an install does not cut it off.

sshd(8) puts SSH_CONNECTION into the session's environment: client address and port, then server address and port. sudo
drops it, so the ancestors of this process are looked at as well: their environment, and the sockets of an sshd itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from tpctl.host.proc import read_net
from tpctl.system import text

PROC = Path("/proc")
VARIABLE = "SSH_CONNECTION"
SERVERS = frozenset({"sshd", "sshd-session", "dropbear"})
"""Names of the processes that serve a session (proc_pid_comm(5)); OpenSSH 9.8 split off sshd-session."""


def session_port(proc: Path = PROC) -> int | None:
    """The port, or None when this is no ssh session, or one into another network namespace."""
    own: frozenset[int] | None = None
    for port in _told_ports(proc):
        if own is None:  # only now: for a list of its sockets, the kernel goes through those of every namespace
            own = local_ports()
        if port in own:
            return port
    return None


def _told_ports(proc: Path) -> Iterator[int]:
    """The ports by which this process and its ancestors may have been reached."""
    told = port_of(os.environ.get(VARIABLE, ""))
    if told is not None:
        yield told
    for process in ancestors(os.getppid(), proc):
        yield from _ports_of(process, proc)


def port_of(connection: str) -> int | None:
    """The server's port in a value of SSH_CONNECTION; None when the session came in by anything but TCP."""
    words = connection.split()
    try:
        ip_address(words[2])
        return int(words[3])
    except (IndexError, ValueError):
        return None


def ancestors(pid: int, proc: Path = PROC) -> Iterator[Path]:
    """The folders below /proc of a process, its parent, and so on, the first process of the system excepted."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        yield proc / str(pid)
        try:
            # The name stands in parentheses and may contain any of them (proc_pid_stat(5)).
            pid = int(text.read(proc / str(pid) / "stat").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return


def local_ports() -> frozenset[int]:
    """The ports of this network namespace's TCP sockets, whatever their state."""
    return frozenset(sockets_of_tables().values())


def sockets_of_tables() -> dict[str, int]:
    """By inode, as text: the local port of every TCP socket of this network namespace (proc_pid_net(5))."""
    found: dict[str, int] = {}
    for line in (line for name in ("tcp", "tcp6") for line in text.lines(read_net(name))[1:]):
        fields = line.split()
        try:
            found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
        except (IndexError, ValueError):
            continue
    return found


def _ports_of(process: Path, proc: Path) -> Iterator[int]:
    """The ports a process may have been reached by: what its environment says, and, of an sshd, its sockets."""
    try:
        environment = text.read(process / "environ")
        told = (word.partition("=")[2] for word in environment.split("\0") if word.startswith(f"{VARIABLE}="))
        yield from (port for value in told if (port := port_of(value)) is not None)
        if text.read(process / "comm").removesuffix("\n") in SERVERS:
            by_inode = sockets_of_tables()
            for descriptor in (process / "fd").iterdir():
                inode = str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]")
                if inode in by_inode:
                    yield by_inode[inode]
    except OSError:
        return  # it has ended, or is somebody else's
