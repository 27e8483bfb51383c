"""Where the running kernel keeps things: offsets of structure members, from its BTF.

BTF (Documentation/bpf/btf.rst) is an array of type records and a string section. The records have varying lengths, so
finding one properly means walking the hundred thousand before it; that takes Python half a second. Instead the name's
offset in the string section is looked up, and then the bytes a structure record of that name begins with.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tpctl.system.errors import HostError

PLACE = Path("/sys/kernel/btf/vmlinux")
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_KIND_STRUCT = 4
_RECORD = struct.Struct("=III")
"""struct btf_type: name, info, size; and struct btf_member: name, type, offset in bits."""

ANONYMOUS = ""
"""The name of a member that is an unnamed union."""


class Btf:
    """A kernel's type information. Raises ValueError when it is none."""

    def __init__(self, raw: bytes) -> None:
        magic, _, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(raw)
        if magic != _MAGIC:
            raise ValueError("no BTF of this machine's byte order")
        self._types = raw[header + types_at : header + types_at + types_size]
        self._strings = raw[header + strings_at : header + strings_at + strings_size]

    def offsets(self, structure: str, members: tuple[str, ...]) -> Mapping[str, int] | None:
        """Where the members stand in a structure, in bytes; None when no structure of the name has them all."""
        for fields in self._structures(structure):
            if fields.keys() >= set(members):
                return fields
        return None

    def _structures(self, name: str) -> Iterator[dict[str, int]]:
        at = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        if not at:
            return
        wanted = struct.pack("=I", at)
        place = self._types.find(wanted)
        while place >= 0:
            if place % 4 == 0:
                fields = self._fields(place)
                if fields is not None:
                    yield fields
            place = self._types.find(wanted, place + 1)

    def _fields(self, place: int) -> dict[str, int] | None:
        """The members of the structure whose record begins at `place`, or None when none can begin there."""
        try:
            _, info, size = _RECORD.unpack_from(self._types, place)
            count, kind = info & 0xFFFF, info >> 24 & 0x1F
            if kind != _KIND_STRUCT or info & 0x60FF0000 or not count:
                return None
            fields: dict[str, int] = {}
            for number in range(1, count + 1):
                name, _, bits = _RECORD.unpack_from(self._types, place + number * _RECORD.size)
                if info >> 31:
                    bits &= 0xFFFFFF  # the rest is the width of a bit field
                if name >= len(self._strings) or bits // 8 > size:
                    return None
                fields.setdefault(self._string(name), bits // 8)
        except (struct.error, UnicodeDecodeError):
            return None
        return fields

    def _string(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()


def kernel() -> Btf:
    """The running kernel's. Raises HostError when it has none."""
    try:
        return Btf(PLACE.read_bytes())
    except OSError as error:
        raise HostError(
            f"the eBPF engine reads the kernel's own structures, and this kernel does not describe them ({PLACE}: "
            f"{error.strerror}; it needs CONFIG_DEBUG_INFO_BTF); use --engine nftables or --engine iptables"
        ) from error


@functools.cache
def of_kernel(*, cookie: bool) -> Mapping[str, int]:
    """`definitions` of the running kernel, which does not change: to find them takes as long as a short command."""
    return definitions(kernel(), cookie=cookie)


def _of(btf: Btf, structure: str, *members: str) -> tuple[int, ...]:
    found = btf.offsets(structure, members)
    if found is None:
        raise HostError(
            f"this kernel's struct {structure} has no {', '.join(members)}, which the eBPF engine needs to read; "
            "use --engine nftables or --engine iptables"
        )
    return tuple(found[member] for member in members)


def definitions(btf: Btf, *, cookie: bool) -> dict[str, int]:
    """The OFFSET_* of bpf/kernel.c. `cookie` is whether user space knows namespaces by cookie (Linux 5.14 and later).

    Raises HostError when a structure is not as it should be.
    """
    found: dict[str, int] = {}
    (found["SOCK_UID"],) = _of(btf, "sock", "sk_uid")
    (net,) = _of(btf, "sock_common", "skc_net")
    found["SOCK_NET"] = net
    if cookie:
        (found["NET_COOKIE"],) = _of(btf, "net", "net_cookie")
    else:
        (namespace,) = _of(btf, "net", "ns")
        (number,) = _of(btf, "ns_common", "inum")
        found["NET_INODE"] = namespace + number
    found |= _fib4(btf)
    if btf.offsets("netns_ipv6", ("fib6_local_tbl",)):
        found |= _fib6(btf)
    return {f"OFFSET_{name}": offset for name, offset in found.items()}


def _fib4(btf: Btf) -> dict[str, int]:
    (ipv4,) = _of(btf, "net", "ipv4")
    (tables,) = _of(btf, "netns_ipv4", "fib_table_hash")
    link, number, data = _of(btf, "fib_table", "tb_hlist", "tb_id", "tb_data")
    key, pos, bits, children = _of(btf, "key_vector", "key", "pos", "bits", ANONYMOUS)
    alias_link, kind, length = _of(btf, "fib_alias", "fa_list", "fa_type", "fa_slen")
    (root,) = _of(btf, "trie", "kv")
    return {
        "FIB4_TABLES": ipv4 + tables,
        "FIB4_LINK": link,
        "FIB4_ID": number,
        "FIB4_DATA": data,
        "TRIE_ROOT": root,
        "NODE_KEY": key,
        "NODE_POS": pos,
        "NODE_BITS": bits,
        "NODE_CHILDREN": children,
        "ALIAS_LINK": alias_link,
        "ALIAS_TYPE": kind,
        "ALIAS_SLEN": length,
    }


def _fib6(btf: Btf) -> dict[str, int]:
    (ipv6,) = _of(btf, "net", "ipv6")
    (table,) = _of(btf, "netns_ipv6", "fib6_local_tbl")
    (root,) = _of(btf, "fib6_table", "tb6_root")
    left, right, leaf, bit = _of(btf, "fib6_node", "left", "right", "leaf", "fn_bit")
    destination, kind = _of(btf, "fib6_info", "fib6_dst", "fib6_type")
    (address,) = _of(btf, "rt6key", "addr")
    return {
        "FIB6_TABLE": ipv6 + table,
        "FIB6_ROOT": root,
        "FIB6_LEFT": left,
        "FIB6_RIGHT": right,
        "FIB6_LEAF": leaf,
        "FIB6_BIT": bit,
        "FIB6_TYPE": kind,
        "FIB6_ADDRESS": destination + address,
    }
