"""A network namespace to try something in. os.unshare only comes with Python 3.12."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNET = 0x40000000
"""include/uapi/linux/sched.h"""


def into_own_network() -> None:
    """Put the calling thread into a network namespace of its own, which goes when the thread ends.

    Raises OSError when the kernel refuses one: it takes CAP_SYS_ADMIN (unshare(2)).
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
