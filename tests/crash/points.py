"""Which system calls change something that outlives the process: the points at which it is killed, or made to fail.

x86-64 only. A call that only changes the process itself (its memory, its pipes, its own sockets) is no point: being
killed there is the same as being killed at the point before it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import cache

from tests.crash.notify import Call, program

_OPEN_CHANGES = os.O_CREAT | os.O_TRUNC
NUMBERS = {
    "write": 1, "open": 2, "pwrite64": 18, "sendto": 44, "sendmsg": 46, "setsockopt": 54, "truncate": 76,
    "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "mount": 165, "umount2": 166, "setxattr": 188,
    "fsetxattr": 190, "openat": 257, "mkdirat": 258, "fchownat": 260, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "symlinkat": 266, "fchmodat": 268, "renameat2": 316, "bpf": 321,
}  # fmt: skip
NAMES = {number: name for name, number in NUMBERS.items()}

_BPF_CHANGES = {
    0: "create a map", 2: "fill a map", 3: "delete from a map", 5: "load a program", 6: "pin", 8: "attach", 9: "detach",
    28: "create a link", 29: "update a link", 34: "detach a link",
}  # fmt: skip
"""enum bpf_cmd (linux/bpf.h), less those that only read."""
_REPLACE_TABLE, _ADD_COUNTERS = 64, 65
"""IPT_SO_SET_REPLACE and IPT_SO_SET_ADD_COUNTERS, for IPv4 and IPv6 (linux/netfilter_ipv4/ip_tables.h)."""
_SOL_IP, _SOL_IPV6 = 0, 41
_INT = 0xFFFFFFFF
_NFNL_BATCH_BEGIN = 0x10
_NETFILTER_SUBSYSTEMS = 0x100
"""nlmsg_type of nfnetlink is a subsystem, from 1 on, and a message."""
_CONNTRACK_DELETE = 0x102
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_DELETE (linux/netfilter/nfnetlink_conntrack.h)."""
FORGETTING = "conntrack forgets a connection"
_RTM_BASE, _GET = 16, 2
"""rtnetlink(7): types come in fours, NEW, DEL, GET and SET."""


@cache
def filter_program() -> bytes:
    """Reports every call that could be a point, and of the many that open a file those that make or empty one."""
    masks = {NUMBERS["openat"]: (2, _OPEN_CHANGES), NUMBERS["open"]: (1, _OPEN_CHANGES)}
    return program(sorted(NUMBERS.values()), masks)


def describe(call: Call) -> str | None:
    """What a call is about to change, in a few words; None when it is no point."""
    name = NAMES[call.number]
    kind = _KINDS.get(name)
    what = kind(call) if kind else _path(call)
    return None if what is None else f"{name} {what}".rstrip()


def _path(call: Call) -> str | None:
    """For calls on a path, which is their first or second argument."""
    name = NAMES[call.number]
    where = call.arguments[1] if "at" in name[-3:] or name.endswith("at2") else call.arguments[0]
    path = call.text(where)
    return None if "__pycache__" in path or path == "/dev/null" else path


def _descriptor(call: Call) -> str | None:
    path = call.opened(call.arguments[0] & _INT)
    return path if path.startswith("/") and not path.startswith(("/memfd:", "/dev/")) else None


def _table(call: Call) -> str | None:
    level, option = (argument & _INT for argument in call.arguments[1:3])
    if level not in (_SOL_IP, _SOL_IPV6) or option not in (_REPLACE_TABLE, _ADD_COUNTERS):
        return None
    table = call.memory(call.arguments[3], 32).partition(b"\0")[0].decode(errors="replace")
    what = "replace the table" if option == _REPLACE_TABLE else "add counters to the table"
    return f"{what} {table} of IPv{4 if level == _SOL_IP else 6}"


def _message(call: Call) -> str | None:
    return _netlink(call.memory(call.arguments[1], 16))


def _messages(call: Call) -> str | None:
    header = call.memory(call.arguments[1], 56)
    if len(header) < 56:
        return None
    (first,) = struct.unpack_from("Q", header, 16)
    vector = call.memory(first, 16)
    if len(vector) < 16:
        return None
    return _netlink(call.memory(struct.unpack("QQ", vector)[0], 16))


def _netlink(head: bytes) -> str | None:
    """Whether a netlink message changes anything. One that is none (syslog, D-Bus) counts as changing nothing."""
    if len(head) < 16:
        return None
    (kind,) = struct.unpack_from("H", head, 4)
    if kind == _NFNL_BATCH_BEGIN:  # nf_tables is changed in batches only
        return "nf_tables transaction"
    if kind == _CONNTRACK_DELETE:
        return FORGETTING
    if _RTM_BASE < kind < _NETFILTER_SUBSYSTEMS and kind % 4 != _GET:
        return f"rtnetlink message {kind}"
    return None


_KINDS: dict[str, Callable[[Call], str | None]] = {
    "write": _descriptor,
    "pwrite64": _descriptor,
    "ftruncate": _descriptor,
    "fchmod": _descriptor,
    "fchown": _descriptor,
    "fsetxattr": _descriptor,
    "setsockopt": _table,
    "sendto": _message,
    "sendmsg": _messages,
    "bpf": lambda call: _BPF_CHANGES.get(call.arguments[0] & _INT),
}

FILES = frozenset(NUMBERS) - {"sendto", "sendmsg", "setsockopt", "bpf"}
"""The calls that a full or read-only disk makes fail."""
