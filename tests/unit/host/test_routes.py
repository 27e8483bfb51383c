"""Reading and writing netlink messages about routes; what the kernel answers is tested in tests/netns/test_local.py."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.host import routes
from tpctl.host.routes import Route, build_request, parse_reply


def reply(kind: int, attributes: bytes = b"", table: int = 254) -> bytes:
    """An answer of the kernel's about an IPv4 address."""
    body = bytes((2, 32, 0, 0, table, 0, 0, kind)) + bytes(4) + b"\x08\0\4\0\1\0\0\0" + attributes
    return (16 + len(body)).to_bytes(4, "little") + b"\x18\0" + bytes(10) + body


def refusal(number: int) -> bytes:
    return struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -number) + bytes(16)


@given(st.binary(max_size=128))
def test_any_answer_is_read_or_refused(answer: bytes) -> None:
    with contextlib.suppress(OSError):
        assert parse_reply(answer) is None or isinstance(parse_reply(answer), Route)


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL])
def test_a_refusal_says_that_nothing_gets_there(number: int) -> None:
    assert parse_reply(refusal(number)) is None


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_an_error_that_says_nothing_of_the_address_is_raised(number: int) -> None:
    with pytest.raises(OSError, match=r".") as raised:
        parse_reply(refusal(number))
    assert raised.value.errno == number


def test_what_an_answer_says() -> None:
    source = b"\x08\0\7\0" + bytes((10, 0, 0, 5))
    assert parse_reply(reply(2, source, table=255)) == Route(socket.AF_INET, 2, 255, 1, bytes((10, 0, 0, 5)), False)
    far = parse_reply(reply(1, b"\x08\0\x0f\0" + struct.pack("=I", 1506)))
    assert far is not None
    assert (far.table, far.is_local, far.source) == (1506, False, None)


@pytest.mark.parametrize(
    ("kind", "attributes", "near"),
    [(2, b"", True), (1, b"", True), (1, b"\x08\0\5\0\x0a\0\0\1", False), (1, b"\x0a\0\x12\0\2\0\x0a\0\0\1\0\0", False),
     (7, b"", False)],
)  # fmt: skip
def test_who_is_reached_without_a_router(kind: int, attributes: bytes, near: bool) -> None:
    found = parse_reply(reply(kind, attributes))
    assert found is not None
    assert found.is_near is near


def test_of_ipv4_only_the_table_local_counts_for_rules() -> None:
    for table, matches in ((255, True), (254, True), (200, False)):
        found = parse_reply(reply(2, table=table))
        assert found is not None
        assert (found.is_local, found.matches_local) == (True, matches)


def test_a_link_local_address_is_looked_up_on_its_interface() -> None:
    packed = ip_address("fe80::1").packed
    plain, scoped = build_request(packed), build_request(packed, interface=7)
    assert scoped.endswith(struct.pack("=HHI", 8, 4, 7))
    assert int.from_bytes(scoped[:4], "little") == len(scoped) == len(plain) + 8


def test_this_machine() -> None:
    route = routes.to_address(ip_address("127.0.0.1"))
    assert route is not None
    assert route.is_local
    assert route.source == ip_address("127.0.0.1")
    assert routes.interface_name(route.interface) in {name for _, name in socket.if_nameindex()}
    assert routes.to_address(ip_address("fe80::1%no-such-interface")) is None
