"""The PROXY protocol, versions 1 and 2: what a header says, and how one is written. Pure.

The specification is doc/proxy-protocol.txt of HAProxy; its section numbers stand below.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpctl.relay.connections.crc32c import crc32c
from tpctl.relay.loop.original_destination import Destination

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
"""Of version 2."""
_START = b"PROXY "
"""Of version 1."""
MAX_V1 = 107
"""2.1: the longest line, CRLF included."""
MAX_V2 = 16 * 1024
"""The longest header of version 2 that is read. The format allows 64 KiB; what is in use has a few hundred bytes."""
PP2_TYPE_CRC32C = 0x03

_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED = 0x00
_PREFIX = struct.Struct("!BBH")
_FIXED = len(SIGNATURE) + _PREFIX.size
_ADDRESS_SIZE = {0: 0, 1: 12, 2: 36, 3: 216}
"""By address family: unspecified, IPv4, IPv6, unix."""
_TLV = struct.Struct("!BH")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_MAPPED = b"\0" * 10 + b"\xff\xff"


class MalformedHeaderError(ValueError):
    """What came is no header; says why."""


class Tlv(NamedTuple):
    """A piece of further information, 2.2."""

    kind: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a proxy says of a connection."""

    version: int
    local: bool = False
    """The proxy speaks for itself, for instance to see whether we are alive."""
    source: Destination | None = None
    """None: not known, or of a kind that means nothing here."""
    destination: Destination | None = None
    tlvs: tuple[Tlv, ...] = ()


class HeaderReader:
    """Takes the bytes of a connection until the header is complete, and none that come after it."""

    def __init__(self) -> None:
        self._got = b""
        self.header: Header | None = None
        """Not None as soon as it is complete."""

    def take(self, data: bytes) -> int:
        """How many of the next bytes belong to the header. Raises MalformedHeaderError."""
        whole = self._got + data
        if whole.startswith(_START):
            size = _v1_size(whole)
        elif whole.startswith(SIGNATURE):
            size = _v2_size(whole)
        elif _START.startswith(whole) or SIGNATURE.startswith(whole):
            size = None
        else:
            raise MalformedHeaderError("it begins like neither version 1 nor version 2")
        if size is None or size > len(whole):
            taken = len(data)
        else:
            taken = size - len(self._got)
            self.header = parse(whole[:size])
        self._got += data[:taken]
        return taken


def parse(raw: bytes) -> Header:
    """The header that these bytes are, all of them. Raises MalformedHeaderError."""
    if raw.startswith(SIGNATURE):
        if _v2_size(raw) != len(raw):
            raise MalformedHeaderError("its length is wrong")
        return _parse_v2(raw)
    if not raw.endswith(b"\r\n") or len(raw) > MAX_V1:
        raise MalformedHeaderError("it does not end as a line of version 1")
    return _parse_v1(raw)


def _v1_size(data: bytes) -> int | None:
    end = data.find(b"\r\n", 0, MAX_V1)
    if end < 0 and len(data) >= MAX_V1:
        raise MalformedHeaderError(f"its line is longer than {MAX_V1} bytes")
    return end + 2 if end >= 0 else None


def _v2_size(data: bytes) -> int | None:
    if len(data) < _FIXED:
        return None
    size = _FIXED + int(_PREFIX.unpack_from(data, len(SIGNATURE))[2])
    if size > MAX_V2:
        raise MalformedHeaderError(f"it is longer than {MAX_V2} bytes")
    return size


def _parse_v1(raw: bytes) -> Header:
    try:
        words = raw[:-2].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise MalformedHeaderError("it is not ASCII") from None
    if words[:2] == ["PROXY", "UNKNOWN"]:  # 2.1: whatever follows is ignored
        return Header(1)
    families = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}
    if len(words) != 6 or words[0] != "PROXY" or words[1] not in families:
        raise MalformedHeaderError("it is not PROXY TCP4|TCP6|UNKNOWN with two addresses and two ports")
    family = families[words[1]]
    source, destination = (_v1_endpoint(family, words[at], words[at + 2]) for at in (2, 3))
    return Header(1, source=source, destination=destination)


def _v1_endpoint(family: socket.AddressFamily, host: str, port: str) -> Destination:
    try:
        packed = socket.inet_pton(family, host)
    except (OSError, ValueError):
        raise MalformedHeaderError("an address is not of its family") from None
    if not _PORT.fullmatch(port) or int(port) > 0xFFFF:
        raise MalformedHeaderError("a port is not within 0-65535")
    return _endpoint(family, packed, int(port))


def _endpoint(family: int, packed: bytes, port: int) -> Destination:
    """An address in the form in which the relay keeps it: IPv4 as such, even if it was mapped into IPv6."""
    if family == socket.AF_INET6 and packed.startswith(_MAPPED):
        family, packed = socket.AF_INET, packed[-4:]
    return Destination(socket.inet_ntop(family, packed), port, family)


def _parse_v2(raw: bytes) -> Header:
    command, kind, _length = _PREFIX.unpack_from(raw, len(SIGNATURE))
    family, transport = kind >> 4, kind & 0xF
    if command not in (_LOCAL, _PROXY):
        raise MalformedHeaderError(f"{command:#04x} is not a version and command")
    if command == _PROXY and (family not in _ADDRESS_SIZE or transport > 2 or (family == 0) != (transport == 0)):
        raise MalformedHeaderError(f"{kind:#04x} is not a family and transport")
    rest = raw[_FIXED:]
    size = _ADDRESS_SIZE.get(family, len(rest))
    if command == _PROXY and len(rest) < size:
        raise MalformedHeaderError("its addresses are cut off")
    tlvs = _tlvs(rest[size:], raw)
    if command == _LOCAL:  # 2.2: the addresses of such a header mean nothing
        return Header(2, local=True, tlvs=tlvs)
    if transport != 1 or family not in (1, 2):
        return Header(2, tlvs=tlvs)
    af, width = (socket.AF_INET, 4) if family == 1 else (socket.AF_INET6, 16)
    source_port, destination_port = struct.unpack_from("!HH", rest, 2 * width)
    source = _endpoint(af, rest[:width], source_port)
    destination = _endpoint(af, rest[width : 2 * width], destination_port)
    return Header(2, source=source, destination=destination, tlvs=tlvs)


def _tlvs(data: bytes, raw: bytes) -> tuple[Tlv, ...]:
    found, at = [], 0
    while at < len(data):
        if len(data) - at < _TLV.size:
            raise MalformedHeaderError("a TLV is cut off")
        kind, length = _TLV.unpack_from(data, at)
        value = data[at + _TLV.size : at + _TLV.size + length]
        if len(value) < length:
            raise MalformedHeaderError("a TLV is cut off")
        if kind == PP2_TYPE_CRC32C:
            _check_crc(raw, len(raw) - len(data) + at + _TLV.size, value)
        found.append(Tlv(kind, value))
        at += _TLV.size + length
    return tuple(found)


def _check_crc(raw: bytes, place: int, value: bytes) -> None:
    """2.2.4: the checksum is that of the whole header with its own field zero."""
    if len(value) != 4:
        raise MalformedHeaderError("its checksum does not have 4 bytes")
    if crc32c(raw[:place] + bytes(4) + raw[place + 4 :]) != int.from_bytes(value, "big"):
        raise MalformedHeaderError("its checksum is wrong")


def build(header: Header) -> bytes:
    """The bytes of a header. A checksum among its TLVs is computed anew."""
    return _build_v1(header) if header.version == 1 else _build_v2(header)


def _build_v1(header: Header) -> bytes:
    source, destination = header.source, header.destination
    if header.local or source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    hosts = [source.host, destination.host]
    if source.family != destination.family:
        hosts = [host if ":" in host else f"::ffff:{host}" for host in hosts]
    name = "TCP6" if ":" in hosts[0] else "TCP4"
    return f"PROXY {name} {hosts[0]} {hosts[1]} {source.port} {destination.port}\r\n".encode()


def _build_v2(header: Header) -> bytes:
    kind, addresses = _v2_addresses(header)
    command = _LOCAL if header.local else _PROXY
    tlvs, place = b"", None
    for tlv in header.tlvs:
        value = tlv.value
        if tlv.kind == PP2_TYPE_CRC32C:
            place, value = _FIXED + len(addresses) + len(tlvs) + _TLV.size, bytes(4)
        tlvs += _TLV.pack(tlv.kind, len(value)) + value
    raw = SIGNATURE + _PREFIX.pack(command, kind, len(addresses) + len(tlvs)) + addresses + tlvs
    if place is None:
        return raw
    return raw[:place] + crc32c(raw).to_bytes(4, "big") + raw[place + 4 :]


def _v2_addresses(header: Header) -> tuple[int, bytes]:
    source, destination = header.source, header.destination
    if header.local or source is None or destination is None:
        return _UNSPECIFIED, b""
    ports = struct.pack("!HH", source.port, destination.port)
    both = (source, destination)
    if all(end.family == socket.AF_INET for end in both):
        return 0x11, b"".join(socket.inet_pton(socket.AF_INET, end.host) for end in both) + ports
    return 0x21, b"".join(_packed6(end) for end in both) + ports


def _packed6(end: Destination) -> bytes:
    if end.family == socket.AF_INET:
        return _MAPPED + socket.inet_pton(socket.AF_INET, end.host)
    return socket.inet_pton(socket.AF_INET6, end.host)


def announce(received: Header | None, version: int, source: Destination | None, destination: Destination) -> bytes:
    """The header for an upstream: what an earlier proxy has said is passed on, its TLVs too where they have a place."""
    if received is not None and received.local:
        return build(Header(version, local=True, tlvs=received.tlvs))
    if received is not None and received.destination is not None:
        destination = received.destination
    tlvs: Sequence[Tlv] = received.tlvs if received is not None else ()
    return build(Header(version, source=source, destination=destination, tlvs=tuple(tlvs)))
