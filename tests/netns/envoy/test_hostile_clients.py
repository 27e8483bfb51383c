"""Clients that break the rules of their protocol: they get nothing out of it, others are served, and Envoy lives."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.netns.envoy.application import PROXY_V2
from tests.netns.envoy.conftest import HOST, STRANGER, TRUSTED, Scene
from tests.netns.envoy.scene import curl, exchange
from tests.netns.envoy.test_client_address import REQUEST, parsed
from tests.netns.relay.net import TIMEOUT, process_status

pytestmark = pytest.mark.root
GROWTH = 64 * 1024
"""KiB, far less than what an attack of these would need to matter."""


@pytest.fixture(autouse=True)
def others_are_served(scene: Scene) -> Iterator[None]:
    yield
    assert curl(scene.net, scene.net.peer, HOST[4], 8001).status == 200
    assert scene.envoy.process.poll() is None, scene.envoy.log()


def ends(host: str = "203.0.113.65") -> bytes:
    return socket.inet_aton(host) + socket.inet_aton(HOST[4]) + bytes(4)


def tlv(kind: int, value: bytes, length: int | None = None) -> bytes:
    return bytes([kind]) + struct.pack("!H", len(value) if length is None else length) + value


def version2(command: int, family: int, data: bytes, length: int | None = None) -> bytes:
    return (
        PROXY_V2 + bytes([0x20 | command, family]) + struct.pack("!H", len(data) if length is None else length) + data
    )


NO_HEADERS = {
    "shorter than its addresses": version2(1, 0x11, ends()[:8]),
    "without addresses": version2(1, 0x11, b""),
    "of no family": version2(1, 0, b""),
    "of a unix socket": version2(1, 0x31, bytes(216)),
    "of an unknown command": version2(2, 0x11, ends()),
    "of version 3": PROXY_V2 + bytes([0x31, 0x11, 0, 12]) + ends(),
    "TLV longer than the header": version2(1, 0x11, ends() + tlv(0xEA, b"x", 500)),
    "TLV without a length": version2(1, 0x11, ends() + b"\xea\x00"),
    "port 65536": b"PROXY TCP4 203.0.113.65 10.99.0.2 1 65536\r\n",
    "negative port": b"PROXY TCP4 203.0.113.65 10.99.0.2 -1 1\r\n",
    "octal": b"PROXY TCP4 203.0.113.065 10.99.0.2 1 1\r\n",
    "two blanks": b"PROXY  TCP4 203.0.113.65 10.99.0.2 1 1\r\n",
    "another family": b"PROXY TCP6 203.0.113.65 10.99.0.2 1 1\r\n",
    "without an end": b"PROXY TCP4 " + b"1" * 200,
    "in small letters": b"proxy tcp4 203.0.113.65 10.99.0.2 1 1\r\n",
    "and more on its line": b"PROXY TCP4 203.0.113.65 10.99.0.2 1 1 GET / HTTP/1.1\r\n",
}


@pytest.mark.parametrize("port", [8010, 8011, 8014])
@pytest.mark.parametrize("header", NO_HEADERS.values(), ids=NO_HEADERS.keys())
def test_what_is_no_proxy_protocol_header(scene: Scene, header: bytes, port: int) -> None:
    assert exchange(scene.net, scene.net.peer, (HOST[4], port), header + REQUEST, TRUSTED[4]) == b""


@pytest.mark.parametrize(
    "more",
    [tlv(4, bytes(20)), tlv(3, bytes(4)), tlv(0x20, b"\x07"), tlv(2, b"a\r\nX-Real-IP: 6.6.6.6\0"),
     tlv(0xEA, b"") * 20_000, tlv(0xEA, b"z" * 65_000)],
    ids=["noop", "crc", "ssl", "lines", "many", "long"],
)  # fmt: skip
def test_odd_tlvs_change_nothing(scene: Scene, more: bytes) -> None:
    answer = exchange(
        scene.net, scene.net.peer, (HOST[4], 8011), version2(1, 0x11, ends() + more) + REQUEST, TRUSTED[4]
    )
    assert parsed(answer).header("x-real-ip") == ["203.0.113.65"]


def test_a_second_header_is_data(scene: Scene) -> None:
    twice = version2(1, 0x11, ends()) + version2(1, 0x11, ends("203.0.113.66"))
    answer = exchange(scene.net, scene.net.peer, (HOST[4], 8011), twice + REQUEST, TRUSTED[4], begin=True)
    assert answer.startswith(b"HTTP/1.1 400")


SECOND = b"GET /second HTTP/1.1\r\nHost: h\r\n\r\n"
AMBIGUOUS = {
    "folded": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n" % len(SECOND),
    "no coding": b"Transfer-Encoding: xchunked\r\nContent-Length: 3\r\n\r\nabc",
    "vertical tab": b"Transfer-Encoding:\x0bchunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n" % len(SECOND),
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "plus": b"Content-Length: +%d\r\n\r\n" % len(SECOND),
    "list": b"Content-Length: 3, 3\r\n\r\n",
    "negative": b"Content-Length: -1\r\n\r\n",
    "hexadecimal": b"Content-Length: 0x10\r\n\r\n",
    "tab": b"Content-Length\t: 3\r\n\r\n",
    "blank": b"X-Real-IP : 6.6.6.6\r\n\r\n",
    "no name": b": x\r\n\r\n",
    "zero byte": b"X: a\0b\r\n\r\n",
    "hop by hop": b"Connection: X-Real-IP, X-Forwarded-For\r\n\r\n",
}


@pytest.mark.parametrize("rest", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_requests_whose_end_or_headers_are_in_doubt(scene: Scene, rest: bytes) -> None:
    data = b"POST /first HTTP/1.1\r\nHost: h\r\n" + rest + SECOND
    answer = exchange(scene.net, scene.net.peer, (HOST[4], 8001), data, STRANGER[4], begin=True)
    assert answer.split()[1] in (b"400", b"501"), answer
    assert b"/second" not in answer


@pytest.mark.parametrize(
    "rest", [b"X: " + b"a" * 65_000, b"\r\n".join(b"X%d: a" % number for number in range(150))], ids=["large", "many"]
)
def test_headers_beyond_every_measure(scene: Scene, rest: bytes) -> None:
    data = b"GET / HTTP/1.1\r\nHost: h\r\n" + rest + b"\r\n\r\n"
    answer = exchange(scene.net, scene.net.peer, (HOST[4], 8001), data, begin=True)
    assert not answer or answer.startswith(b"HTTP/1.1 431")  # a reset after it takes it back


def test_trailers_are_no_headers(scene: Scene) -> None:
    data = (
        b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\nX-Real-IP: 6.6.6.6\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    )
    answer = exchange(scene.net, scene.net.peer, (HOST[4], 8001), data, STRANGER[4])
    assert b" 200 " in answer
    assert b"6.6.6.6" not in answer


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    return struct.pack("!I", len(data))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + data


GET = bytes([0x82, 0x84, 0x86, 0x41, 1]) + b"h"
FLOODS = {
    "resets": b"".join(frame(1, 5, one, GET) + frame(3, 0, one, bytes(4)) for one in range(1, 40_001, 2)),
    "pings": frame(6, 0, 0, bytes(8)) * 50_000,
    "settings": frame(4, 0, 0) * 50_000,
    "continuations": frame(1, 0, 1, GET) + frame(9, 0, 1, b"\x40\x01a\x01b") * 50_000,
    "empty data": frame(1, 4, 1, GET) + frame(0, 0, 1) * 50_000,
    "priorities": frame(2, 0, 1, b"\0\0\0\0\x10") * 50_000,
    "windows": frame(8, 0, 0, b"\0\0\0\1") * 50_000,
    "streams": b"".join(frame(1, 4, one, GET) for one in range(1, 10_001, 2)),
    "a line in a header": frame(1, 5, 1, GET + b"\x40\x01x\x09a\r\nb: c\r\n"),
    "a coding": frame(1, 5, 1, GET + b"\x40\x11transfer-encoding\x07chunked"),
}


@pytest.mark.parametrize("frames", FLOODS.values(), ids=FLOODS.keys())
def test_floods_of_http2_take_no_memory(scene: Scene, frames: bytes) -> None:
    def memory() -> int:
        return int(process_status(scene.envoy.process.pid)["VmRSS"].split()[0])

    before = memory()
    with scene.net.connect(scene.net.peer, (HOST[4], 8005), STRANGER[4]) as client:
        client.settimeout(TIMEOUT)
        with contextlib.suppress(OSError):  # it has ended the connection, or reads no more
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frames)
        assert curl(scene.net, scene.net.peer, HOST[4], 8001).status == 200
        assert memory() < before + GROWTH


def test_clients_that_never_finish_hold_up_nobody(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(200):
            port, begin = ((8001, b"GET / HTTP/1.1\r\nX: "), (8005, b"G"), (8020, b"\x16\x03\x01"))[number % 3]
            client = stack.enter_context(scene.net.connect(scene.net.peer, (HOST[4], port), STRANGER[4]))
            client.sendall(begin)
        assert curl(scene.net, scene.net.peer, HOST[4], 8001).status == 200
        assert curl(scene.net, scene.net.peer, HOST[4], 8005).status == 401
