"""Telling systemd how the relay is doing: the protocol of sd_notify(3)."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time


def notify(state: str) -> bool:
    """Send a state such as "READY=1"; whether anybody listens. A supervisor that has gone is no error."""
    address = _manager()
    if address is None:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
        return True
    return False


def store(name: str, *sockets: socket.socket) -> None:
    """Have systemd keep sockets for the next start, under a name (sd_pid_notify_with_fds(3), FDSTORE=1).

    Nothing without a store: systemd says in FDSTORE how many it takes; before version 254 our unit does.
    """
    descriptors = array.array("i", [sock.fileno() for sock in sockets])
    _tell_store(f"FDSTORE=1\nFDNAME={name}", [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def unstore(name: str) -> None:
    """Have systemd close the sockets of this name."""
    _tell_store(f"FDSTOREREMOVE=1\nFDNAME={name}", [])


def _tell_store(state: str, ancillary: list[tuple[int, int, array.array[int]]]) -> None:
    address = _manager()
    if address is None or not os.environ.get("FDSTORE", "").isdecimal():
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendmsg([state.encode()], ancillary, 0, address)


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
