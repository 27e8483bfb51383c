"""Telling systemd how the relay is doing: the protocol of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(state: str) -> bool:
    """Send a state such as "READY=1"; whether anybody listens. A supervisor that has gone is no error."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
        return True
    return False


def reloading() -> None:
    """Say that the configuration is being read; "READY=1" must follow. The time is asked for by sd_notify(3)."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval() -> float | None:
    """How often, in seconds, systemd wants to hear "WATCHDOG=1" of this process; None when it does not.

    Half of the time after which it would be killed, as sd_watchdog_enabled(3) advises.
    """
    limit, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit.isdecimal() or int(limit) == 0 or process not in ("", str(os.getpid())):
        return None
    return int(limit) / 2_000_000
