"""The PROXY protocol: headers as the specification writes them, broken ones, and any bytes at all."""

from __future__ import annotations

import contextlib
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.relay.connections.crc32c import crc32c
from tpctl.relay.connections.proxy_protocol import (
    MAX_V1,
    MAX_V2,
    PP2_TYPE_CRC32C,
    SIGNATURE,
    Header,
    HeaderReader,
    MalformedHeaderError,
    Tlv,
    announce,
    build,
    parse,
)
from tpctl.relay.loop.original_destination import Destination

V6 = socket.AF_INET6
CLIENT, SERVER = Destination("192.0.2.1", 40000), Destination("198.51.100.2", 443)
CLIENT6, SERVER6 = Destination("2001:db8::1", 40000, V6), Destination("2001:db8::2", 443, V6)


@pytest.mark.parametrize(
    ("line", "header"),
    [
        (b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n", Header(1, source=CLIENT, destination=SERVER)),
        (b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 443\r\n", Header(1, source=CLIENT6, destination=SERVER6)),
        (b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 40000 443\r\n", Header(1, source=CLIENT, destination=SERVER6)),
        (b"PROXY UNKNOWN\r\n", Header(1)),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", Header(1)),
    ],
)
def test_version_1(line: bytes, header: Header) -> None:
    assert parse(line) == header


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 40000\r\n",
        b"PROXY TCP4 192.0.2.1  198.51.100.2 40000 443\r\n",
        b"PROXY TCP4 2001:db8::1 198.51.100.2 40000 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.256 40000 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 040 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 +40 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 \xb2 443\r\n",
        b"PROXY TCP5 192.0.2.1 198.51.100.2 1 443\r\n",
        b"PROXY TCP4 192.0.2.1\0 198.51.100.2 1 443\r\n",
        b"PROXY \r\n",
        b"PROXY TCP6 " + b"f" * 100 + b"\r\n",
        b"GET / HTTP/1.1\r\n",
        b"",
    ],
)
def test_what_is_not_version_1(line: bytes) -> None:
    with pytest.raises(MalformedHeaderError):
        parse(line)


def v2(command: int, kind: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(body)) + body


IPV4 = socket.inet_aton("192.0.2.1") + socket.inet_aton("198.51.100.2") + struct.pack("!HH", 40000, 443)


@pytest.mark.parametrize(
    ("raw", "header"),
    [
        (v2(0x21, 0x11, IPV4), Header(2, source=CLIENT, destination=SERVER)),
        (v2(0x21, 0x11, IPV4 + b"\x01\0\2h2\x04\0\0"),
         Header(2, source=CLIENT, destination=SERVER, tlvs=(Tlv(1, b"h2"), Tlv(4, b"")))),
        (v2(0x21, 0x31, bytes(216) + b"\xea\0\1x"), Header(2, tlvs=(Tlv(0xEA, b"x"),))),
        (v2(0x21, 0x12, IPV4), Header(2)),
        (v2(0x21, 0x00, b""), Header(2)),
        (v2(0x20, 0x00, b""), Header(2, local=True)),
        (v2(0x20, 0x11, IPV4), Header(2, local=True)),
        (v2(0x20, 0x11, b"abc"), Header(2, local=True)),
        (v2(0x20, 0xF7, b"whatever it is"), Header(2, local=True)),
    ],
)  # fmt: skip
def test_version_2(raw: bytes, header: Header) -> None:
    assert parse(raw) == header


@pytest.mark.parametrize(
    "raw",
    [
        v2(0x11, 0x11, IPV4),
        v2(0x22, 0x11, IPV4),
        v2(0x21, 0x41, IPV4),
        v2(0x21, 0x13, IPV4),
        v2(0x21, 0x10, IPV4),
        v2(0x21, 0x01, IPV4),
        v2(0x21, 0x11, IPV4[:-1]),
        v2(0x21, 0x21, IPV4),
        v2(0x21, 0x11, IPV4 + b"\x01\0"),
        v2(0x21, 0x11, IPV4 + b"\x01\0\3h2"),
        v2(0x21, 0x11, IPV4 + b"\x03\0\4\0\0\0\0"),
        v2(0x21, 0x11, IPV4 + b"\x03\0\3\0\0\0"),
        v2(0x21, 0x11, IPV4) + b"more",
        v2(0x21, 0x11, IPV4)[:-1],
        v2(0x21, 0x11, bytes(MAX_V2)),
    ],
)
def test_what_is_not_version_2(raw: bytes) -> None:
    with pytest.raises(MalformedHeaderError):
        parse(raw)


def test_the_checksum_is_the_one_of_the_rfc() -> None:
    """RFC 3720 appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(range(32)) == 0x46DD794E


def is_plain(address: IPv4Address | IPv6Address) -> bool:
    return not isinstance(address, IPv6Address) or address.ipv4_mapped is None


endpoints4 = st.builds(lambda a, p: Destination(str(a), p), st.ip_addresses(v=4), st.integers(0, 65535))
endpoints6 = st.builds(
    lambda a, p: Destination(socket.inet_ntop(V6, a.packed), p, V6),
    st.ip_addresses(v=6).filter(is_plain),
    st.integers(0, 65535),
)
tlvs = st.lists(st.builds(Tlv, st.integers(0, 255).filter(lambda k: k != PP2_TYPE_CRC32C), st.binary(max_size=40)))
headers = st.one_of(
    st.builds(Header, st.just(1), source=endpoints4, destination=endpoints4),
    st.builds(Header, st.just(1), source=endpoints6, destination=endpoints6),
    st.builds(Header, st.just(2), source=endpoints4 | endpoints6, destination=endpoints6, tlvs=tlvs.map(tuple)),
    st.builds(Header, st.just(2), source=endpoints4, destination=endpoints4, tlvs=tlvs.map(tuple)),
    st.builds(Header, st.just(2), local=st.booleans(), tlvs=tlvs.map(tuple)),
    st.just(Header(1)),
)


@given(headers)
def test_what_is_built_says_what_was_meant(header: Header) -> None:
    assert parse(build(header)) == header


@given(headers.filter(lambda header: header.version == 2), st.data())
def test_a_changed_byte_is_found_by_the_checksum(header: Header, data: st.DataObject) -> None:
    whole = build(Header(2, header.local, header.source, header.destination, (*header.tlvs, Tlv(3, b"...."))))
    assert parse(whole).tlvs[-1].value != b"...."
    place = data.draw(st.integers(16, len(whole) - 1))
    broken = whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
    try:
        found = parse(broken)
    except MalformedHeaderError:
        return
    # The change has made another TLV of the checksum, or hidden it in one: then nothing was checked.
    assert PP2_TYPE_CRC32C not in [tlv.kind for tlv in found.tlvs]


@given(headers, st.binary(max_size=60), st.lists(st.integers(1, 40), max_size=30))
def test_the_reader_takes_the_header_and_nothing_else(header: Header, payload: bytes, sizes: list[int]) -> None:
    """As it is used: look at what is there, take what belongs to the header."""
    raw = build(header)
    stream = raw + payload
    reader, at = HeaderReader(), 0
    for size in (*sizes, *[len(stream)] * 3):
        if reader.header is None:
            at += reader.take(stream[at : at + size])
    assert (reader.header, stream[at:]) == (header, payload)


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda b: SIGNATURE + b) | st.binary(max_size=120).map(
    lambda b: b"PROXY TCP4 " + b))  # fmt: skip
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    reader = HeaderReader()
    with contextlib.suppress(MalformedHeaderError):
        assert 0 <= reader.take(data) <= len(data)
        assert reader.header is not None or len(data) < max(MAX_V1, MAX_V2)


def test_what_an_earlier_proxy_said_is_passed_on() -> None:
    received = Header(2, source=CLIENT, destination=SERVER, tlvs=(Tlv(2, b"host"), Tlv(3, b"\0\0\0\0")))
    onwards = parse(announce(received, 2, CLIENT, SERVER6))
    assert (onwards.source, onwards.destination) == (CLIENT, SERVER)
    assert [tlv.kind for tlv in onwards.tlvs] == [2, 3]
    assert announce(received, 1, CLIENT, SERVER6) == b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n"
    assert parse(announce(Header(2, local=True), 2, CLIENT, SERVER)).local
    assert announce(None, 1, None, SERVER) == b"PROXY UNKNOWN\r\n"
    assert parse(announce(None, 2, CLIENT, SERVER)) == Header(2, source=CLIENT, destination=SERVER)
