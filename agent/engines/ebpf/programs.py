"""The eBPF programs: where each is attached, and how the text of bpf/*.c becomes instructions."""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import ApplyError, HostError

SOURCES = ("types.c", "kernel.c", "decide.c", "outbound.c", "data_plane.c", "inbound.c")
_STUBS = "stubs"
_PSEUDO_MAP_FD = 1
_LOAD_IMM64 = 0x18
"""A two-instruction load; with source register BPF_PSEUDO_MAP_FD its number is a map's descriptor."""


class Scope(enum.Enum):
    """What a program is attached to."""

    APPLICATIONS = "the applications' cgroup"
    DATA_PLANE = "the data plane's cgroup"
    NAMESPACE = "the network namespace"


@dataclass(frozen=True, slots=True)
class Program:
    """A program of bpf/ and its place in the kernel (include/uapi/linux/bpf.h)."""

    name: str
    kind: int
    attach_type: int
    scope: Scope


_SOCK_OPS, _SOCK_ADDR, _SOCKOPT, _SK_LOOKUP = 13, 18, 25, 30

PROGRAMS = (
    Program("getsockopt", _SOCKOPT, 21, Scope.DATA_PLANE),
    Program("sockops", _SOCK_OPS, 3, Scope.DATA_PLANE),
    Program("getpeername4", _SOCK_ADDR, 29, Scope.APPLICATIONS),
    Program("getpeername6", _SOCK_ADDR, 30, Scope.APPLICATIONS),
    Program("recvmsg4", _SOCK_ADDR, 19, Scope.APPLICATIONS),
    Program("recvmsg6", _SOCK_ADDR, 20, Scope.APPLICATIONS),
    Program("sk_lookup", _SK_LOOKUP, 36, Scope.NAMESPACE),
    Program("connect4", _SOCK_ADDR, 10, Scope.APPLICATIONS),
    Program("connect6", _SOCK_ADDR, 11, Scope.APPLICATIONS),
    Program("sendmsg4", _SOCK_ADDR, 14, Scope.APPLICATIONS),
    Program("sendmsg6", _SOCK_ADDR, 15, Scope.APPLICATIONS),
)
"""In the order they are attached: those that answer for redirected connections before those that redirect."""

KEPT_MAPS = ("asked", "in_flight", "anchor", "listeners")
"""What traffic fills: they outlive a change of policy."""
POLICY_MAPS = ("settings", "ports", "networks", "users", "servers")
COUNTERS = "counters"
MAPS = (*POLICY_MAPS, COUNTERS, *KEPT_MAPS)


def sources() -> Path:
    """The directory of the C programs. Raises HostError when this installation lacks it."""
    here = Path(__file__).resolve()
    # Installed, they are a package beside this one; in a checkout they are at its top.
    for candidate in (here.parents[2] / "bpf", here.parents[3] / "bpf"):
        if (candidate / SOURCES[0]).exists():
            return candidate
    raise HostError("the eBPF programs are missing from this installation of tpctl (bpf/*.c); install it again")


@dataclass(slots=True)
class Compiled:
    """Instructions by program name, and empty maps by name. `close` it."""

    instructions: Mapping[str, bytes]
    maps: Mapping[str, int]
    """Descriptors that belong to `module`."""
    module: Any = field(repr=False)

    def with_maps(self, name: str, kept: Mapping[str, int]) -> bytes:
        """A program's instructions, using the maps of `kept` in place of its own."""
        other = {self.maps[name]: descriptor for name, descriptor in kept.items()}
        code = bytearray(self.instructions[name])
        for at in range(0, len(code), 8):
            if code[at] == _LOAD_IMM64 and code[at + 1] >> 4 == _PSEUDO_MAP_FD:
                own = int.from_bytes(code[at + 4 : at + 8], "little")
                code[at + 4 : at + 8] = other.get(own, own).to_bytes(4, "little")
        return bytes(code)

    def close(self) -> None:
        """Let go of the maps and of the compiler's memory."""
        self.module.cleanup()


def compile_all(constants: Mapping[str, int]) -> Compiled:
    """Compile the programs with `constants` defined, and make their maps.

    Raises HostError when bcc is missing, ApplyError when it cannot compile them or the kernel refuses a map.
    """
    where = sources()
    text = "\n".join((where / name).read_text(encoding="utf-8") for name in SOURCES)
    previous = os.environ.get("BCC_KERNEL_SOURCE")
    os.environ["BCC_KERNEL_SOURCE"] = str(where / _STUBS)
    try:
        return _compile(text, constants)
    finally:
        if previous is None:
            del os.environ["BCC_KERNEL_SOURCE"]
        else:
            os.environ["BCC_KERNEL_SOURCE"] = previous


def _compile(text: str, constants: Mapping[str, int]) -> Compiled:
    try:
        from bcc import BPF
        from bcc.libbcc import lib
    except (ImportError, OSError) as error:
        raise HostError(
            "the eBPF engine needs bcc's Python bindings (Debian, Ubuntu: apt install python3-bpfcc; Fedora, RHEL: dnf "
            f"install python3-bcc); importing them failed: {error}. Or use --engine nftables or --engine iptables"
        ) from error
    flags = [*(f"-D{name}={value}" for name, value in constants.items()), "-Wno-everything"]
    try:
        module = BPF(text=text.encode(), cflags=flags)
    except Exception as error:  # bcc raises nothing narrower
        raise ApplyError(
            f"bcc could not prepare the eBPF programs: {error} (the compiler's messages stand above). "
            "Nothing was changed"
        ) from error
    instructions = {
        program.name: ctypes.string_at(
            lib.bpf_function_start(module.module, program.name.encode()),
            lib.bpf_function_size(module.module, program.name.encode()),
        )
        for program in PROGRAMS
    }
    maps = {name: int(lib.bpf_table_fd(module.module, name.encode())) for name in MAPS}
    return Compiled(instructions, maps, module)
