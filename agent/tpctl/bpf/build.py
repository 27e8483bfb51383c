"""How the text of bpf/*.c becomes instructions for this kernel: once, by bcc; then from a cache.

The instructions depend on the kernel (its structures' offsets) but not on the policy, which is in the maps.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpctl.bpf import syscall
from tpctl.bpf.programs import MAPS, PROGRAMS
from tpctl.system import private_folder
from tpctl.system.errors import ApplyError, HostError
from tpctl.system.input_files import read_private
from tpctl.system.seclusion import secluded

CONTEXT = "context.c"
"""How every program reads and writes what the kernel gives it."""
SOURCES = (CONTEXT, "types.c", "kernel.c", "decide.c", "outbound.c", "data_plane.c", "inbound.c")
CACHE = Path("/var/cache/tpctl")
STUBS = "stubs"
_TEMPORARY = ".ebpf-"
_METHOD = 2
"""Changes with the way of compiling: what was compiled before in a stranger's surroundings is not believed."""
_PSEUDO_MAP_FD = 1
_LOAD_IMM64 = 0x18
"""A two-instruction load; with source register BPF_PSEUDO_MAP_FD its number is a map's descriptor."""
_PLACEHOLDERS = {"NETWORKS": 1, "USERS": 1, "SERVERS": 1, "PORT_LISTS": 1, "IN_FLIGHT": 1}
"""Sizes of the maps that bcc makes; ours are made to fit the policy."""
_MAX_SIZE = 16 * 1024 * 1024
"""Bytes of a cached build; one has a tenth of a megabyte."""


@dataclass(frozen=True, slots=True)
class Build:
    """The programs' instructions, in which a map is its position in `MAPS`; and what each map is made of."""

    instructions: Mapping[str, bytes]
    shapes: Mapping[str, syscall.Shape]

    def with_maps(self, name: str, maps: Mapping[str, int]) -> bytes:
        """A program's instructions for maps that exist (descriptors by name)."""
        return _with_maps(self.instructions[name], {number: maps[each] for number, each in enumerate(MAPS)})

    def dump(self) -> str:
        """As text, for the cache."""
        return json.dumps(
            {
                "instructions": {name: code.hex() for name, code in self.instructions.items()},
                "shapes": {name: asdict(shape) for name, shape in self.shapes.items()},
            }
        )

    @classmethod
    def parse(cls, text: str) -> Build:
        """The opposite of `dump`. Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(text)
        return cls(
            {program.name: bytes.fromhex(raw["instructions"][program.name]) for program in PROGRAMS},
            {name: syscall.Shape(**raw["shapes"][name]) for name in MAPS},
        )


def _with_maps(instructions: bytes, numbers: Mapping[int, int]) -> bytes:
    code = bytearray(instructions)
    for at in range(0, len(code), 8):
        if code[at] == _LOAD_IMM64 and code[at + 1] >> 4 == _PSEUDO_MAP_FD:
            number = int.from_bytes(code[at + 4 : at + 8], "little")
            code[at + 4 : at + 8] = numbers[number].to_bytes(4, "little")
    return bytes(code)


def sources() -> Path:
    """The directory of the C programs. Raises HostError when this installation lacks it."""
    found = Path(__file__).resolve().with_name("sources")
    if (found / SOURCES[0]).exists():
        return found
    raise HostError("the eBPF programs are missing from this installation of tpctl (bpf/*.c); install it again")


def build(offsets: Mapping[str, int], cache: Path = CACHE) -> Build:
    """The programs for a kernel with these structures: from the cache, or compiled and put there.

    Raises HostError when bcc is missing, ApplyError when it cannot compile them or the kernel refuses a map.
    """
    return _build(tuple(sorted(offsets.items())), cache)


@functools.lru_cache(maxsize=4)
def _build(offsets: tuple[tuple[str, int], ...], cache: Path) -> Build:
    where = sources()
    text = "\n".join((where / name).read_text(encoding="utf-8") for name in SOURCES)
    key = hashlib.sha256(repr((_METHOD, text, offsets, MAPS, os.uname().machine)).encode()).hexdigest()[:32]
    file = cache / f"ebpf-{key}.json"
    found = _cached(file)
    if found is None:
        found = _compile(text, where / STUBS, dict(offsets))
        _keep(file, found)
    return found


def _cached(file: Path) -> Build | None:
    """What the cache holds. What others than root could have written is not loaded into the kernel."""
    if not private_folder.is_private(file.parent):
        return None
    try:
        return Build.parse(read_private(file, _MAX_SIZE).decode("ascii"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _keep(file: Path, built: Build) -> None:
    """Put a build into the cache, and older ones away. It is no misfortune when that cannot be done."""
    with contextlib.suppress(OSError):
        private_folder.prepare(file.parent)
        _clear_leftovers(file.parent)
        descriptor, temporary = private_folder.new_file(file.parent, _TEMPORARY)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(built.dump())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        for other in file.parent.glob("ebpf-*.json"):
            if other != file:
                other.unlink(missing_ok=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a tpctl that was killed was writing. One that still writes has to compile again the next time."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def forget(*, dry_run: bool = False) -> tuple[str, ...]:
    """Remove the cache; says what went. What cannot be removed does no harm."""
    files = tuple(CACHE.glob("ebpf-*.json")) if private_folder.is_private(CACHE) else ()
    if files and not dry_run:
        try:
            for file in files:
                file.unlink(missing_ok=True)
            _clear_leftovers(CACHE)
        except OSError:
            return ()
        with contextlib.suppress(OSError):
            CACHE.rmdir()
    return tuple(f"the compiled eBPF programs {file}" for file in files)


def _compile(text: str, stubs: Path, offsets: Mapping[str, int]) -> Build:
    flags = [*(f"-D{name}={value}" for name, value in {**offsets, **_PLACEHOLDERS}.items()), "-Wno-everything"]
    with alone(stubs):
        try:
            from bcc import BPF
            from bcc.libbcc import lib
        except (ImportError, OSError) as error:
            raise HostError(
                "the eBPF engine needs bcc's Python bindings (Debian, Ubuntu: apt install python3-bpfcc; Fedora, RHEL: "
                f"dnf install python3-bcc); importing them failed: {error}. Or use --engine nftables or iptables"
            ) from error
        try:
            module = BPF(text=text.encode(), cflags=flags)
        except Exception as error:  # bcc raises nothing narrower
            raise ApplyError(
                f"bcc could not prepare the eBPF programs: {error} (see the compiler's messages above). "
                "Nothing was changed"
            ) from error
    try:
        return _taken_from(module, lib)
    finally:
        module.cleanup()


def alone(stubs: Path) -> AbstractContextManager[None]:
    """Where bcc compiles: with headers from `stubs`, and none that the caller has a part in.

    It has the working directory on its search path, and ARCH on the path of another one; clang adds those of CPATH and
    C_INCLUDE_PATH; and BCC_LINUX_VERSION_CODE makes the programs for another kernel.
    """
    return secluded({"BCC_KERNEL_SOURCE": str(stubs)})


def _taken_from(module: Any, lib: Any) -> Build:
    descriptors = {name: int(lib.bpf_table_fd(module.module, name.encode())) for name in MAPS}
    numbers = {descriptor: MAPS.index(name) for name, descriptor in descriptors.items()}
    instructions = {}
    for program in PROGRAMS:
        name = program.name.encode()
        size = lib.bpf_function_size(module.module, name)
        instructions[program.name] = _with_maps(
            ctypes.string_at(lib.bpf_function_start(module.module, name), size), numbers
        )
    shapes = {name: syscall.map_info(descriptor).shape for name, descriptor in descriptors.items()}
    return Build(instructions, shapes)
