"""What the relay parses: socket addresses, netlink answers, control messages."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tpctl.relay.connections import routes
from tpctl.relay.loop import packet_info
from tpctl.relay.loop.original_destination import (
    Destination,
    from_socket_name,
    is_mapped,
    parse_ipv4,
    parse_ipv6,
    recover,
    unmapped,
)

PORTS = st.integers(0, 65535)
V4 = st.ip_addresses(v=4)
V6 = st.ip_addresses(v=6)


def sockaddr_in(address: IPv4Address, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + address.packed + bytes(8)


def sockaddr_in6(address: IPv6Address, port: int, scope: int) -> bytes:
    head = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0)
    return head + address.packed + struct.pack("=I", scope)


@given(V4, PORTS)
def test_an_ipv4_socket_address(address: IPv4Address, port: int) -> None:
    assert parse_ipv4(sockaddr_in(address, port)) == Destination(str(address), port)


@given(V6, PORTS, st.integers(0, 2**32 - 1))
def test_an_ipv6_socket_address(address: IPv6Address, port: int, scope: int) -> None:
    parsed = parse_ipv6(sockaddr_in6(address, port, scope))
    if address.ipv4_mapped:
        assert parsed == Destination(str(address.ipv4_mapped), port)
    else:
        assert ip_address(parsed.host) == address
        assert parsed == Destination(parsed.host, port, socket.AF_INET6, scope)
        assert parsed.sockaddr == (parsed.host, port, 0, scope)


@given(st.binary(max_size=40))
def test_other_bytes_are_no_socket_address(raw: bytes) -> None:
    family = int.from_bytes(raw[:2], "little")
    assume(family not in (socket.AF_INET, socket.AF_INET6) or len(raw) not in (16, 28))
    with pytest.raises(ValueError):
        parse_ipv4(raw)
    with pytest.raises(ValueError):
        parse_ipv6(raw)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (("192.0.2.1", 80), Destination("192.0.2.1", 80)),
        (("::ffff:192.0.2.1", 80, 0, 0), Destination("192.0.2.1", 80)),
        (("2001:db8::1", 80, 0, 0), Destination("2001:db8::1", 80, socket.AF_INET6)),
        (("fe80::1%eth0", 80, 0, 3), Destination("fe80::1", 80, socket.AF_INET6, 3)),
        (("::ffff:0:1", 80, 0, 0), Destination("::ffff:0:1", 80, socket.AF_INET6)),
    ],
)
def test_socket_names(name: tuple[str, int], expected: Destination) -> None:
    assert from_socket_name(name) == expected


@given(V4)
def test_a_mapped_address_is_unmapped_and_others_are_left_alone(address: IPv4Address) -> None:
    assert is_mapped(f"::ffff:{address}")
    assert unmapped(f"::ffff:{address}") == str(address)
    assert unmapped(str(address)) == str(address)


@pytest.mark.parametrize("text", ["[::1]:80", "127.0.0.1:80"])
def test_destinations_are_shown_as_in_urls(text: str) -> None:
    family = socket.AF_INET6 if "[" in text else socket.AF_INET
    assert str(Destination(text.rpartition(":")[0].strip("[]"), 80, family)) == text


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.needs("ipv6"))])
def test_without_a_translation_the_destination_is_where_the_connection_arrived(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((address, port)):
            accepted, peer = listener.accept()
            with accepted:
                assert recover(accepted, peer[0]) == Destination(address, port, family)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        pytest.param("::1", True, marks=pytest.mark.needs("ipv6")),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
    ],
)
def test_the_kernel_knows_which_addresses_are_local(address: str, local: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert routes.is_local(Destination(address, 15001, family)) is local


@given(V4, V4, st.integers(0, 2**31 - 1))
def test_an_ipv4_answer_leaves_from_the_address_asked(asked: IPv4Address, header: IPv4Address, interface: int) -> None:
    received = (socket.SOL_IP, packet_info.IP_PKTINFO, struct.pack("=i4s4s", interface, asked.packed, header.packed))
    [(level, kind, data)] = packet_info.answer_from([(1, 2, b"other"), received])
    assert (level, kind) == (socket.SOL_IP, packet_info.IP_PKTINFO)
    assert struct.unpack("=i4s4s", data) == (0, asked.packed, bytes(4))


@given(V6, st.integers(0, 2**31 - 1))
def test_an_ipv6_answer_leaves_from_the_address_asked(asked: IPv6Address, interface: int) -> None:
    received = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", asked.packed, interface))
    [(level, kind, data)] = packet_info.answer_from([received])
    assert (level, kind) == received[:2]
    assert struct.unpack("=16si", data) == (asked.packed, interface if asked.is_link_local else 0)


def test_without_packet_information_the_kernel_chooses() -> None:
    assert packet_info.answer_from([]) == []
    assert packet_info.answer_from([(socket.SOL_IP, packet_info.IP_PKTINFO, b"short")]) == []
