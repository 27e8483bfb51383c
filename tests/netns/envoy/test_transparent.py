"""Behind TPROXY: the application sees the client's own address, for streams and for requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.envoy.application import answer_http, serving
from tests.netns.envoy.scene import Envoy, curl, exchange, running
from tests.netns.envoy.test_client_address import REQUEST, header1
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, Net

pytestmark = pytest.mark.root
TEXT = """
listeners:
  - listen: "[::]:15006 ipv6only=off transparent"
    direction: inbound
    source: client
    services:
      - {port: 8081, protocol: http, real_ip_header: X-Real-IP}
      - {port: 8082, proxy_protocol: true, trusted_ips: [10.99.0.1, "fd99::1"]}
      - port: 8083
        proxy_protocol: true
        trusted_ips: [10.99.0.1, "fd99::1"]
        protocol: http
        real_ip_header: X-Real-IP
"""
PORTS = (8080, 8081, 8082, 8083)


@pytest.fixture(scope="module")
def transparent() -> Iterator[tuple[Net, Envoy]]:
    with relay_net.network(redirect=False) as net, relay_net.public_directory() as folder:
        net.hand_over_by_tproxy(*PORTS)
        net.add_address(net.peer, "10.99.0.66/24")
        net.add_address(net.peer, "fd99::66/64", "eth0", "preferred_lft", "0")
        for version, gateway in (("-4", PEER4), ("-6", PEER6)):  # answers to clients elsewhere have to have a route
            relay_net.run("ip", "-n", net.host, version, "route", "add", "default", "via", gateway)
        with running(net, folder, TEXT) as envoy:
            yield net, envoy


@pytest.mark.parametrize(("host", "peer"), [(HOST4, PEER4), (HOST6, PEER6)], ids=["v4", "v6"])
@pytest.mark.parametrize("port", PORTS[:2], ids=["tcp", "http"])
def test_the_application_sees_the_client(transparent: tuple[Net, Envoy], port: int, host: str, peer: str) -> None:
    net, envoy = transparent
    with serving(net, net.host, port, answer_http):
        asked = curl(net, net.peer, host, port).asked
        assert asked["peer"] == peer
        assert asked["local"] == [host, port]
        assert asked.header("x-real-ip") == ([peer] if port == 8081 else [])
    status = Path(f"/proc/{envoy.process.pid}/status").read_text()
    assert "Uid:\t65534\t65534" in status
    assert re.findall(r"Cap(?:Prm|Eff):\s+(\w+)", status) == ["0000000000002000"] * 2


@pytest.mark.parametrize(("host", "peer"), [(HOST4, PEER4), (HOST6, PEER6)], ids=["v4", "v6"])
@pytest.mark.parametrize("port", PORTS[2:], ids=["tcp", "http"])
def test_the_client_is_the_one_in_the_header(transparent: tuple[Net, Envoy], port: int, host: str, peer: str) -> None:
    """The application sees it, and the address in the header is not what is dialled."""
    net, _ = transparent
    client, named = ("203.0.113.9", "127.0.0.1") if peer == PEER4 else ("2001:db8::9", "::1")
    with serving(net, net.host, port, answer_http):
        answer = exchange(net, net.peer, (host, port), header1(client, named, 1) + REQUEST)
        assert f'"peer": "{client}"'.encode() in answer
        assert f'"local": ["{host}", {port}]'.encode() in answer


@pytest.mark.parametrize(("host", "peer"), [(HOST4, PEER4), (HOST6, PEER6)], ids=["v4", "v6"])
@pytest.mark.parametrize("port", PORTS[2:], ids=["tcp", "http"])
def test_strangers_are_not_heard(transparent: tuple[Net, Envoy], port: int, host: str, peer: str) -> None:
    net, _ = transparent
    stranger = "10.99.0.66" if peer == PEER4 else "fd99::66"
    with serving(net, net.host, port, answer_http) as servers:
        for data in (REQUEST, header1("203.0.113.9" if peer == PEER4 else "2001:db8::9", host, port) + REQUEST):
            assert exchange(net, net.peer, (host, port), data, stranger) == b""
        assert exchange(net, net.peer, (host, port), REQUEST, peer) == b""
        assert [one for server in servers for one in server.peers] == []
