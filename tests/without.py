"""Runs a program on a kernel that refuses something: `python -m tests.without bpf legacy -- PROGRAM ARGUMENT...`

For what a machine may lack, so that tests can be shown to say so instead of failing. A filter of system calls
(seccomp(2)) answers in the kernel's place; it goes with the program, and nothing of the machine is changed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Callable, Iterator

NUMBERS = {
    "x86_64": {"setsockopt": 54, "getsockopt": 55, "ptrace": 101, "unshare": 272, "bpf": 321},
    "aarch64": {"setsockopt": 208, "getsockopt": 209, "ptrace": 117, "unshare": 97, "bpf": 280},
}
LEVELS, TABLES = (0, 41), (64, 65, 66, 67)
"""SOL_IP and SOL_IPV6, and the socket options of ip_tables (linux/netfilter_ipv4/ip_tables.h)."""
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARGUMENTS_AT = 0, 16
"""Within struct seccomp_data; the low half of each argument comes first on these machines."""


def _refuse(call: str, error: int, *conditions: tuple[int, tuple[int, ...]]) -> Iterator[bytes]:
    """Instructions that refuse a call whose arguments (by their place) have one of some values each."""
    number = NUMBERS[platform.machine()][call]
    steps: list[tuple[int, tuple[int, ...]]] = [(_NUMBER_AT, (number,))]
    steps += [(_ARGUMENTS_AT + 8 * place, values) for place, values in conditions]
    after = 1  # instructions from here to the next rule
    backwards: list[bytes] = [_instruction(_RETURN, _ERRNO | error)]
    for at, values in reversed(steps):
        tests = []
        for place, value in enumerate(reversed(values)):
            missed = after if place == 0 else 0
            tests.append(_instruction(_EQUAL, value, place, missed))
        block = [_instruction(_LOAD, at), *reversed(tests)]
        backwards[:0] = block
        after += len(block)
    yield from backwards


def _instruction(code: int, operand: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, operand)


def _legacy() -> Iterator[bytes]:
    for call in ("getsockopt", "setsockopt"):
        yield from _refuse(call, errno.ENOPROTOOPT, (1, LEVELS), (2, TABLES))


RULES: dict[str, Callable[[], Iterator[bytes]]] = {
    "bpf": lambda: _refuse("bpf", errno.EPERM),
    "legacy": _legacy,
    "namespaces": lambda: _refuse("unshare", errno.EPERM),
    "ptrace": lambda: _refuse("ptrace", errno.EPERM),
}
"""What can be refused, as a kernel without it would."""


def refuse(*names: str) -> None:
    """Have the kernel refuse these to this process and to all that it starts, for good. Raises OSError."""
    rules = [instruction for name in names for instruction in RULES[name]()]
    text = b"".join([*rules, _instruction(_RETURN, _ALLOW)])
    code = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("=HxxxxxxQ", len(text) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Become the program."""
    at = sys.argv.index("--")
    refuse(*sys.argv[1:at])
    os.execvp(sys.argv[at + 1], sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
