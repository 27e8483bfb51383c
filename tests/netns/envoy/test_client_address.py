"""Who the client is: X-Forwarded-For, X-Real-IP and PROXY protocol headers, from those who are trusted and others."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from tests.netns.envoy.application import PROXY_V2, Asked
from tests.netns.envoy.conftest import FAMILIES, HOST, STRANGER, TRUSTED, Scene
from tests.netns.envoy.scene import curl, exchange, headers
from tests.netns.relay.net import Net

pytestmark = pytest.mark.root

ELSEWHERE = {4: "203.0.113.9", 6: "2001:db8:1::9"}
REQUEST = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def ask(scene: Scene, family: int, port: int, *given: str, source: str) -> Asked:
    return curl(scene.net, scene.net.peer, HOST[family], port, *headers(*given), source=source).asked


@FAMILIES
def test_a_strangers_word_about_itself_is_removed(scene: Scene, family: int) -> None:
    spoofed = [f"{name}: {ELSEWHERE[family]}" for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X_Real_IP")]
    asked = ask(scene, family, 8001, *spoofed, "X-Forwarded-Proto: https", "X-Forwarded-Host: evil",
                "X-Forwarded-Client-Cert: Subject=root", source=STRANGER[family])  # fmt: skip
    assert asked.header("x-real-ip") == [STRANGER[family]]
    assert asked.header("x-forwarded-for") == [STRANGER[family]]
    assert asked.header("x-forwarded-proto") == ["http"]
    for name in ("forwarded", "x_real_ip", "x-forwarded-host", "x-forwarded-client-cert"):
        assert asked.header(name) == [], name
    assert ELSEWHERE[family] not in str(asked["headers"])


@FAMILIES
def test_a_trusted_proxy_names_the_client(scene: Scene, family: int) -> None:
    asked = ask(scene, family, 8001, f"X-Forwarded-For: {ELSEWHERE[family]}", source=TRUSTED[family])
    assert asked.header("x-real-ip") == [ELSEWHERE[family]]
    assert asked.header("x-forwarded-for") == [f"{ELSEWHERE[family]},{TRUSTED[family]}"]


@FAMILIES
def test_of_several_proxies_the_last_that_is_not_trusted_is_the_client(scene: Scene, family: int) -> None:
    """As with nginx's real_ip_recursive: what the client itself had written before is not believed."""
    chain = f"X-Forwarded-For: 192.0.2.1, {ELSEWHERE[family]}, {TRUSTED[family]}"
    assert ask(scene, family, 8001, chain, source=TRUSTED[family]).header("x-real-ip") == [ELSEWHERE[family]]


@FAMILIES
def test_a_trusted_proxy_that_says_nothing_is_the_client(scene: Scene, family: int) -> None:
    assert ask(scene, family, 8001, source=TRUSTED[family]).header("x-real-ip") == [TRUSTED[family]]


@FAMILIES
def test_access_is_about_the_real_client(scene: Scene, family: int) -> None:
    other = {4: "203.0.113.66", 6: "2001:db8:1::66"}[family]

    def status(client: str | None, source: str) -> int:
        given = headers(f"X-Forwarded-For: {client}") if client else ()
        return curl(scene.net, scene.net.peer, HOST[family], 8002, *given, source=source).status

    assert status(ELSEWHERE[family], TRUSTED[family]) == 200
    assert status(other, TRUSTED[family]) == 403
    assert status(None, TRUSTED[family]) == 403
    assert status("::ffff:203.0.113.65", TRUSTED[family]) == 200
    assert status("::ffff:203.0.113.66", TRUSTED[family]) == 403
    assert status("203.0.113.65, ::ffff:10.99.0.1", TRUSTED[family]) == 200
    assert status(None, STRANGER[family]) == 200
    assert status(ELSEWHERE[family], {4: "10.99.0.13", 6: "fd99::13"}[family]) == 403


def header1(source: str, destination: str, port: int) -> bytes:
    kind = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {kind} {source} {destination} 4711 {port}\r\n".encode()


def header2(source: str, destination: str, port: int) -> bytes:
    first, second = ip_address(source), ip_address(destination)
    data = first.packed + second.packed + struct.pack("!HH", 4711, port)
    data += bytes([0xEA, 0, 3]) + b"tlv"
    return PROXY_V2 + bytes([0x21, 0x11 if first.version == 4 else 0x21]) + struct.pack("!H", len(data)) + data


HEADERS = pytest.mark.parametrize("header", [header1, header2], ids=["v1", "v2"])


def said(net: Net, family: int, port: int, data: bytes, source: str) -> bytes:
    return exchange(net, net.peer, (HOST[family], port), data + REQUEST, source)


def parsed(answer: bytes) -> Asked:
    import json

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    if b"chunked" in head.lower():
        body = body.partition(b"\r\n")[2].rpartition(b"\r\n0\r\n")[0]
    return Asked(json.loads(body))


@FAMILIES
@HEADERS
def test_a_trusted_senders_header_names_the_client(scene: Scene, family: int, header) -> None:  # type: ignore[no-untyped-def]
    data = header(ELSEWHERE[family], HOST[family], 8011)
    asked = parsed(said(scene.net, family, 8011, data, TRUSTED[family]))
    assert asked.header("x-real-ip") == [ELSEWHERE[family]]
    assert asked["local"] == [HOST[family] if family == 4 else HOST[6], 8011]


@FAMILIES
@pytest.mark.parametrize("port", [8010, 8011])
@HEADERS
def test_a_strangers_header_is_refused(scene: Scene, family: int, port: int, header) -> None:  # type: ignore[no-untyped-def]
    assert said(scene.net, family, port, header(ELSEWHERE[family], HOST[family], port), STRANGER[family]) == b""


@FAMILIES
@pytest.mark.parametrize("port", [8010, 8011])
def test_who_sends_no_header_is_refused(scene: Scene, family: int, port: int) -> None:
    for source in (TRUSTED[family], STRANGER[family]):
        assert said(scene.net, family, port, b"", source) == b""


@FAMILIES
@pytest.mark.parametrize(
    "header", [b"PROXY UNKNOWN\r\n", PROXY_V2 + b"\x20\x00\x00\x00"], ids=["unknown", "local"]
)  # fmt: skip
def test_health_checks_are_from_the_sender_itself(scene: Scene, family: int, header: bytes) -> None:
    asked = parsed(said(scene.net, family, 8011, header, TRUSTED[family]))
    assert asked.header("x-real-ip") == [TRUSTED[family]]


def test_access_is_about_the_client_in_the_header(scene: Scene) -> None:
    for client, admitted in (("203.0.113.65", True), ("203.0.113.66", False)):
        answer = said(scene.net, 4, 8010, header1(client, HOST[4], 8010), TRUSTED[4])
        assert bool(answer) is admitted, answer
        for header in (header1, header2):  # as a proxy writes them that listens on one socket for both families
            mapped = header(f"::ffff:{client}", f"::ffff:{HOST[4]}", 8010)
            assert bool(said(scene.net, 4, 8010, mapped, TRUSTED[4])) is admitted


@FAMILIES
def test_headers_are_sent_to_the_application(scene: Scene, family: int) -> None:
    peer = STRANGER[family]
    kind = {4: "TCP4", 6: "TCP6"}[family]
    first = curl(scene.net, scene.net.peer, HOST[family], 8012, source=peer).asked
    words = first["proxy"].split()
    assert [*words[:4], words[5]] == ["PROXY", kind, peer, HOST[family], "8012"]
    second = curl(scene.net, scene.net.peer, HOST[family], 8013, source=peer).asked
    assert second["proxy"] == f"v2 {peer} {HOST[family]} 8013"


@FAMILIES
@HEADERS
def test_a_received_client_is_sent_on(scene: Scene, family: int, header) -> None:  # type: ignore[no-untyped-def]
    data = header(ELSEWHERE[family], HOST[family], 8014)
    asked = parsed(said(scene.net, family, 8014, data, TRUSTED[family]))
    assert asked["proxy"].split()[:2] == ["v2", ELSEWHERE[family]]
