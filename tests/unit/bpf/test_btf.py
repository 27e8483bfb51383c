"""Offsets from BTF: a small one made here, and the running kernel's."""

from __future__ import annotations

import struct

import pytest

from tpctl.bpf import btf
from tpctl.bpf.btf import ANONYMOUS, Btf
from tpctl.system.errors import HostError

_STRUCT = 4 << 24


def made(*structures: tuple[str, dict[str, int]], kind: int = _STRUCT) -> bytes:
    """BTF with these structures: a name, and offsets in bytes by member."""
    strings = bytearray(b"\0")
    places = {"": 0}

    def place(text: str) -> int:
        if text not in places:
            places[text] = len(strings)
            strings.extend(text.encode() + b"\0")
        return places[text]

    types = b""
    for name, members in structures:
        types += struct.pack("=III", place(name), kind | len(members), 64)
        for member, offset in members.items():
            types += struct.pack("=III", place(member), 1, offset * 8)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + bytes(strings)


def test_members_are_found() -> None:
    found = Btf(made(("first", {"a": 0}), ("second", {"a": 8, "b": 16, ANONYMOUS: 24})))
    assert found.offsets("second", ("a", "b")) == {"a": 8, "b": 16, ANONYMOUS: 24}
    assert found.offsets("second", ("a", "missing")) is None
    assert found.offsets("third", ("a",)) is None


def test_of_two_structures_of_a_name_the_one_with_the_members_is_meant() -> None:
    found = Btf(made(("trie", {"other": 0}), ("trie", {"kv": 40})))
    assert found.offsets("trie", ("kv",)) == {"kv": 40}


def test_a_number_that_only_looks_like_a_name_is_no_structure() -> None:
    # The member "b" of the first has the name's offset where a record could begin.
    found = Btf(made(("first", {"name": 1, "b": 2}), ("name", {"x": 4})))
    assert found.offsets("name", ("x",)) == {"x": 4}


def test_other_kinds_are_passed_over() -> None:
    assert Btf(made(("thing", {"x": 4}), kind=5 << 24)).offsets("thing", ("x",)) is None


def test_garbage_is_refused() -> None:
    with pytest.raises(ValueError, match="no BTF"):
        Btf(bytes(64))


def test_a_kernel_without_the_members_is_named_with_the_way_out() -> None:
    with pytest.raises(HostError, match=r"struct sock has no sk_uid.*--engine nftables"):
        btf.definitions(Btf(made(("sock", {"other": 0}))), cookie=True)


def test_the_running_kernel_has_everything() -> None:
    if not btf.PLACE.exists():
        pytest.skip("this kernel has no BTF")
    found = btf.definitions(btf.kernel(), cookie=True)
    assert all(offset >= 0 for offset in found.values())
    assert {"OFFSET_SOCK_UID", "OFFSET_SOCK_NET", "OFFSET_NET_COOKIE", "OFFSET_FIB6_TABLE"} <= found.keys()
    assert "OFFSET_NET_INODE" in btf.definitions(btf.kernel(), cookie=False)
