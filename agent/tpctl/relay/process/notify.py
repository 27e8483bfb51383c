"""Telling systemd how the relay is doing: the protocol of sd_notify(3)."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import Sequence

Ancillary = tuple[int, int, "array.array[int]"]

_PATIENCE_SECONDS = 0.2
"""For a manager that reads nothing just now."""
WATCHDOG = "WATCHDOG=1"
"""Comes again and again, so nobody waits until it is heard."""


def notify(state: str) -> bool:
    """Send a state such as "READY=1"; whether it was heard. A manager that has gone, or hangs, is no error."""
    return _send(state, (), 0.0 if state == WATCHDOG else _PATIENCE_SECONDS)


def store(name: str, *sockets: socket.socket) -> None:
    """Have systemd keep sockets for the next start, under a name (sd_pid_notify_with_fds(3), FDSTORE=1).

    Nothing without a store: systemd says in FDSTORE how many it takes; before version 254 our unit does.
    """
    descriptors = array.array("i", [sock.fileno() for sock in sockets])
    _tell_store(f"FDSTORE=1\nFDNAME={name}", [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def unstore(name: str) -> None:
    """Have systemd close the sockets of this name."""
    _tell_store(f"FDSTOREREMOVE=1\nFDNAME={name}", [])


def _tell_store(state: str, ancillary: Sequence[Ancillary]) -> None:
    if os.environ.get("FDSTORE", "").isdecimal():
        _send(state, ancillary, _PATIENCE_SECONDS)


def _send(state: str, ancillary: Sequence[Ancillary], patience: float) -> bool:
    address = _manager()
    if address is None:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(patience)
        sender.sendmsg([state.encode()], ancillary, 0, address)
        return True
    return False


def _manager() -> str | None:
    """Where the service manager listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return None
    return "\0" + path[1:] if path.startswith("@") else path


def reloading() -> None:
    """Say that the configuration is being read; "READY=1" must follow. The time is asked for by sd_notify(3)."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval(main: int | None = None) -> float | None:
    """How often, in seconds, systemd wants to hear "WATCHDOG=1" of this process, or `main`; None when it does not.

    Half of the time after which it would be killed, as sd_watchdog_enabled(3) advises.
    """
    limit, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit.isdecimal() or int(limit) == 0 or process not in ("", str(main or os.getpid())):
        return None
    return int(limit) / 2_000_000
