"""Connections that are passed on as they are: who is admitted, servers that speak first, the way out."""

from __future__ import annotations

import pytest

from tests.netns.envoy.application import Asked
from tests.netns.envoy.conftest import DENIED, FAMILIES, HOST, STRANGER, TRUSTED, Scene
from tests.netns.envoy.scene import curl, exchange
from tests.netns.relay.net import PEER4, PEER6

pytestmark = pytest.mark.root

PASSTHROUGH = {4: "127.0.0.6", 6: "::6"}
PEER = {4: PEER4, 6: PEER6}


def banner(scene: Scene, family: int, port: int, source: str) -> bytes:
    """What a server says to somebody who says nothing."""
    try:
        with scene.net.connect(scene.net.peer, (HOST[family], port), source) as client:
            return client.recv(100)
    except ConnectionError:  # even of connect(): the end may have come by then
        return b""


@FAMILIES
def test_a_port_without_a_service_is_passed_on(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.peer, HOST[family], 8100).asked
    assert asked["peer"] == PASSTHROUGH[family]
    assert asked["local"] == [HOST[family], 8100]
    assert asked.header("x-forwarded-for") == []


@FAMILIES
def test_a_server_may_speak_first(scene: Scene, family: int) -> None:
    for port in (8030, 8032, 8101):
        assert banner(scene, family, port, TRUSTED[family]) == b"220 hello\r\n"


@FAMILIES
def test_who_is_denied_gets_no_banner(scene: Scene, family: int) -> None:
    """Neither by a list of those denied, nor of those allowed, nor by the listener's own."""
    for port in (8030, 8032):
        assert banner(scene, family, port, STRANGER[family]) == b""
    assert banner(scene, family, 8101, DENIED[family]) == b""
    assert curl(scene.net, scene.net.peer, HOST[family], 8100, source=DENIED[family]).status == 0


@FAMILIES
def test_what_is_http_may_be_found_out(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.peer, HOST[family], 8031, source=TRUSTED[family]).asked
    assert asked.header("x-forwarded-for") != []
    assert curl(scene.net, scene.net.peer, HOST[family], 8031, source=STRANGER[family]).status == 403
    assert exchange(scene.net, scene.net.peer, (HOST[family], 8031), b"\x16\x03\x01\x00\x01", STRANGER[family]) == b""


@FAMILIES
def test_requests_that_leave_get_the_secret(scene: Scene, family: int) -> None:
    for port in (8201, 8202):
        asked = curl(scene.net, scene.net.host, PEER[family], port, "-H", "X-Api-Key: forged").asked
        assert asked.header("x-api-key") == ["s3cret-current"]
        assert asked.header("x-forwarded-for") == []
        assert asked["peer"] == HOST[family]


@FAMILIES
def test_only_those_that_go_where_it_belongs(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.host, STRANGER[family], 8202).asked
    assert asked.header("x-api-key") == []
    assert curl(scene.net, scene.net.host, DENIED[family], 8202).status == 0


@FAMILIES
def test_destinations_that_are_denied(scene: Scene, family: int) -> None:
    assert curl(scene.net, scene.net.host, DENIED[family], 8205).status == 0
    assert curl(scene.net, scene.net.host, STRANGER[family], 8205).status == 200


@FAMILIES
def test_tls_is_added_on_the_way_out(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.host, PEER[family], 8203).asked
    assert isinstance(asked, Asked)
    assert "client_certificate" in asked


@FAMILIES
def test_detection_on_the_way_out(scene: Scene, family: int) -> None:
    assert curl(scene.net, scene.net.host, PEER[family], 8204).status == 200
