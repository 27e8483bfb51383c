"""How many sockets hold something in a map of socket storage: its keys cannot be listed, so an iterator counts them."""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import ExitStack

from agent.engines.ebpf import btf, syscall

_TARGET = "bpf_iter_bpf_sk_storage_map"
_PROG_LOAD, _LINK_CREATE, _ITER_CREATE = 5, 28, 33
_TRACING, _TRACE_ITER = 26, 28
_SEQ_WRITE = 127
_KIND_FUNC = 12
_MEMBER_BYTES = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_EXTRA_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}
"""What follows a record of BTF by its kind, for each member or once; Documentation/bpf/btf.rst."""


def count(map_fd: int) -> int:
    """How many sockets have an entry. Raises OSError."""
    with ExitStack() as stack:
        program = _program()
        stack.callback(os.close, program)
        target = ctypes.create_string_buffer(struct.pack("=I", map_fd))
        about = struct.pack("=IIIIQI", program, 0, _TRACE_ITER, 0, ctypes.addressof(target), 4)
        link = syscall._bpf(_LINK_CREATE, about)
        stack.callback(os.close, link)
        entries = os.fdopen(syscall._bpf(_ITER_CREATE, struct.pack("=II", link, 0)), "rb")
        return len(stack.enter_context(entries).read())


def _program() -> int:
    """Writes a byte for each socket."""

    def code(operation: int, registers: int, offset: int = 0, value: int = 0) -> bytes:
        return struct.pack("=BBhi", operation, registers, offset, value)

    instructions = [
        code(0x79, 0x13, 24),  # r3 = the entry's value
        code(0x15, 0x03, 7),  # none: the end has come
        code(0x79, 0x11),  # r1 = meta
        code(0x79, 0x11),  # r1 = meta->seq
        code(0x72, 0x0A, -8, 1),
        code(0xBF, 0xA2),
        code(0x07, 0x02, 0, -8),
        code(0xB7, 0x03, 0, 1),
        code(0x85, 0x00, 0, _SEQ_WRITE),
        code(0xB7, 0x00),
        code(0x95, 0x00),
    ]
    text = ctypes.create_string_buffer(b"".join(instructions))
    terms = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("=IIQQ", _TRACING, len(instructions), ctypes.addressof(text), ctypes.addressof(terms))
    return syscall._bpf(_PROG_LOAD, head + bytes(44) + struct.pack("=I36xI", _TRACE_ITER, _number_of(_TARGET)))


def _number_of(function: str) -> int:
    """A function's number in the kernel's BTF: the records are counted up to it."""
    raw = btf.PLACE.read_bytes()
    _, _, _, header, types_at, types_size, strings_at, _ = struct.unpack_from("=HBBIIIII", raw)
    wanted = raw.index(b"\0" + function.encode() + b"\0", header + strings_at) + 1 - header - strings_at
    at, number = header + types_at, 1
    while at < header + types_at + types_size:
        name, info, _ = struct.unpack_from("=III", raw, at)
        kind = info >> 24 & 0x1F
        if kind == _KIND_FUNC and name == wanted:
            return number
        at += 12 + (info & 0xFFFF) * _MEMBER_BYTES.get(kind, 0) + _EXTRA_BYTES.get(kind, 0)
        number += 1
    raise LookupError(function)
