"""The bpf(2) system call: maps, programs, links and pins. bcc only compiles; it knows neither links nor pinned ones."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_ATTRIBUTES = 144
"""Bytes of union bpf_attr that are passed; what a kernel does not know must be zero, and is."""

_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD, _PIN, _GET, _PROG_ATTACH = 0, 1, 2, 3, 4, 5, 6, 7, 8
_PROG_BY_ID, _MAP_BY_ID, _INFO, _BTF_LOAD, _LINK_CREATE, _LINK_UPDATE = 13, 14, 15, 18, 28, 29
NO_EXIST = 1
"""BPF_NOEXIST: only update an entry that is not there."""
_INFO_BYTES = 256
_MOST_MAPS = 64
_LOG_BYTES = 1 << 20
_LINK_DETACH = 34
_LINK_CGROUP, _LINK_NETNS = 3, 5

SUPPORTED = platform.machine() in _NUMBERS


class RefusedError(Exception):
    """The verifier refused a program. `log` is what it said."""

    def __init__(self, name: str, error: OSError, log: str) -> None:
        super().__init__(f"{name}: {error.strerror}")
        self.name = name
        self.error = error
        self.log = log


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES)
    result = int(_libc().syscall(_NUMBERS[platform.machine()], command, buffer, _ATTRIBUTES))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def load_program(kind: int, attach_type: int, name: str, instructions: bytes) -> int:
    """Load a program; hands back its descriptor. Raises RefusedError, or OSError when it was not even looked at."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license_text = ctypes.create_string_buffer(b"GPL")  # reading kernel memory is for GPL-compatible programs

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        head = struct.pack("=IIQQ", kind, len(instructions) // 8, _address(code), _address(license_text))
        logging = struct.pack("=IIQ", 1, _LOG_BYTES, _address(log)) if log else struct.pack("=IIQ", 0, 0, 0)
        tail = struct.pack("=II16sII", 0, 0, f"tpctl_{name}".encode()[:15], 0, attach_type)
        return _bpf(_PROG_LOAD, head + logging + tail)

    try:
        return attempt(None)
    except OSError:
        # Asked again for the reason: writing the log makes loading many times slower.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return attempt(log)
        except OSError as error:
            raise RefusedError(name, error, log.value.decode(errors="replace")) from error


def update(map_fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Put an entry into a map. Raises OSError."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(_UPDATE, struct.pack("=IxxxxQQQ", map_fd, _address(key_buffer), _address(value_buffer), flags))


def lookup(map_fd: int, key: bytes, size: int) -> bytes | None:
    """An entry's value, of `size` bytes; None when there is none."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(size)
    try:
        _bpf(_LOOKUP, struct.pack("=IxxxxQQQ", map_fd, _address(key_buffer), _address(value_buffer), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value_buffer.raw


def delete(map_fd: int, key: bytes) -> None:
    """Take an entry out of a map; harmless when there is none. Raises OSError."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_DELETE, struct.pack("=IxxxxQ", map_fd, _address(key_buffer)))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def keys(map_fd: int, size: int) -> Iterator[bytes]:
    """Every key of a map; entries that come and go meanwhile may be missed or met twice."""
    following = ctypes.create_string_buffer(size)
    current: ctypes.Array[ctypes.c_char] | None = None
    while True:
        at = _address(current) if current is not None else 0
        try:
            _bpf(_NEXT_KEY, struct.pack("=IxxxxQQQ", map_fd, at, _address(following), 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        yield following.raw
        current = ctypes.create_string_buffer(following.raw, size)


def pin(descriptor: int, place: Path) -> None:
    """Give an object a name in bpffs, by which it lives on. Raises OSError."""
    name = ctypes.create_string_buffer(os.fsencode(place))
    _bpf(_PIN, struct.pack("=QII", _address(name), descriptor, 0))


def pinned(place: Path) -> int:
    """A descriptor of a pinned object. Raises OSError."""
    name = ctypes.create_string_buffer(os.fsencode(place))
    return _bpf(_GET, struct.pack("=QII", _address(name), 0, 0))


def _info(descriptor: int, prepared: bytes = b"") -> bytes:
    buffer = ctypes.create_string_buffer(prepared, _INFO_BYTES)
    _bpf(_INFO, struct.pack("=IIQ", descriptor, _INFO_BYTES, _address(buffer)))
    return buffer.raw


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What a link attaches where."""

    program: int
    """The program's id."""
    target: int
    """The cgroup's id, or the inode number of the network namespace; 0 when that is gone."""


def link_info(descriptor: int) -> LinkInfo:
    """About a link. Raises OSError."""
    raw = _info(descriptor)
    kind, _, program = struct.unpack_from("=III", raw)
    target = 0
    if kind == _LINK_CGROUP:
        (target,) = struct.unpack_from("=Q", raw, 16)
    elif kind == _LINK_NETNS:
        (target,) = struct.unpack_from("=I", raw, 16)
    return LinkInfo(program, target)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a map is made of."""

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class MapInfo:
    """A map."""

    number: int
    """The map's id."""
    name: str
    shape: Shape


def map_info(descriptor: int) -> MapInfo:
    """About a map. Raises OSError."""
    raw = _info(descriptor)
    kind, number, key_size, value_size, max_entries, flags = struct.unpack_from("=IIIIII", raw)
    name = raw[24:40].split(b"\0")[0].decode(errors="replace")
    return MapInfo(number, name, Shape(kind, key_size, value_size, max_entries, flags))


def create_map(name: str, shape: Shape, *, typed: bool = False) -> int:
    """A new map; hands back its descriptor. Socket storage has to be `typed`. Raises OSError."""
    head = struct.pack("=IIIII", shape.kind, shape.key_size, shape.value_size, shape.max_entries, shape.flags)
    head += struct.pack("=II16sI", 0, 0, name.encode()[:15], 0)
    if not typed:
        return _bpf(_CREATE, head)
    types = _load_types(shape.value_size)
    try:
        return _bpf(_CREATE, head + struct.pack("=III", types, 1, 3))
    finally:
        os.close(types)


def _load_types(value_size: int) -> int:
    """BTF with a 32-bit integer (type 1) for a key, and bytes (type 3) for a value; Documentation/bpf/btf.rst."""
    strings = b"\0int\0byte\0"
    kind_int, kind_array, signed = 1 << 24, 3 << 24, 1 << 24
    types = struct.pack("=IIII", 1, kind_int, 4, signed | 32) + struct.pack("=IIII", 5, kind_int, 1, 8)
    types += struct.pack("=IIIIII", 0, kind_array, 0, 2, 1, value_size)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    raw = header + types + strings
    buffer = ctypes.create_string_buffer(raw, len(raw))
    return _bpf(_BTF_LOAD, struct.pack("=QQIII", _address(buffer), 0, len(raw), 0, 0))


def maps_of(program_fd: int) -> Iterator[int]:
    """Descriptors of the maps a program uses; the caller closes them. Raises OSError."""
    numbers = ctypes.create_string_buffer(4 * _MOST_MAPS)
    wanted = bytearray(_INFO_BYTES)
    struct.pack_into("=IQ", wanted, 52, _MOST_MAPS, _address(numbers))
    (count,) = struct.unpack_from("=I", _info(program_fd, bytes(wanted)), 52)
    for (number,) in struct.iter_unpack("=I", numbers.raw[: 4 * min(count, _MOST_MAPS)]):
        yield _bpf(_MAP_BY_ID, struct.pack("=I", number))


def program_by_id(number: int) -> int:
    """A descriptor of a loaded program. Raises OSError."""
    return _bpf(_PROG_BY_ID, struct.pack("=I", number))


def attach(program_fd: int, target_fd: int, attach_type: int) -> int:
    """Attach a program by a link, which is handed back; it is detached when the link's last reference goes."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program_fd, target_fd, attach_type, 0))


def attach_to_map(program_fd: int, map_fd: int, attach_type: int) -> None:
    """Let a map of sockets run a program for what they receive; the map holds the program from then on."""
    _bpf(_PROG_ATTACH, struct.pack("=IIII", map_fd, program_fd, attach_type, 0))


def replace(link_fd: int, program_fd: int) -> None:
    """Let a link run another program, from one packet to the next. Raises OSError."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", link_fd, program_fd, 0, 0))


def detach(link_fd: int) -> None:
    """Detach a link's program at once; left to the last reference's end, the kernel does so some time later.

    Before Linux 5.9 nothing else is to be had, and this does nothing.
    """
    try:
        _bpf(_LINK_DETACH, struct.pack("=I", link_fd))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
