"""The BPF file system, in which programs and maps outlive the process that made them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tpctl.host.mounts import INIT, mounts
from tpctl.system.errors import HostError


def mount(place: Path) -> None:
    """Mount the BPF file system, for root alone, unless it is there already. Raises HostError."""
    mounted = mounts("thread-self", "bpf")
    if place in mounted or str(place).startswith(str(INIT)):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(place), b"bpf", 0, b"mode=0700") != 0:
        reason = os.strerror(ctypes.get_errno())
        raise HostError(
            f"the BPF file system cannot be mounted at {place}: {reason}; use --engine nftables or --engine iptables"
        )
