"""Each default of Envoy's that is unsafe, attacked."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.netns.envoy.application import serving
from tests.netns.envoy.conftest import FAMILIES, HOST, STRANGER, TRUSTED, Scene
from tests.netns.envoy.scene import curl, exchange
from tests.netns.envoy.test_client_address import HEADERS, REQUEST
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import until
from tests.netns.relay.test_link_local import link_local

pytestmark = pytest.mark.root

CONNECTIONS = 300


@FAMILIES
@pytest.mark.parametrize("port", [15006, 15001])
@pytest.mark.parametrize("where", ["peer", "host"])
def test_it_does_not_dial_itself(scene: Scene, family: int, port: int, where: str) -> None:
    """Without the guard, one such connection ends it within two seconds."""
    before = scene.envoy.descriptors()
    name = scene.net.peer if where == "peer" else scene.net.host
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            with contextlib.suppress(ConnectionError):  # even of connect(): the end may have come by then
                client = stack.enter_context(scene.net.connect(name, (HOST[family], port)))
                client.sendall(b"x")
                assert client.recv(10) == b""
    until(lambda: scene.envoy.descriptors() <= before + 10)
    assert curl(scene.net, scene.net.peer, HOST[family], 8100).status == 200


FORBIDDEN = [("127.0.0.1", 7777), ("::1", 7777), ("169.254.169.254", 80), ("10.99.0.1", 7777), ("fd99::1", 7777)]


@FAMILIES
@pytest.mark.parametrize("port", [8010, 8011])
@pytest.mark.parametrize("sender", ["stranger", "trusted"])
@pytest.mark.parametrize("target", FORBIDDEN, ids=str)
@HEADERS
def test_a_header_never_says_what_is_dialled(  # type: ignore[no-untyped-def]
    scene: Scene, family: int, port: int, sender: str, target: tuple[str, int], header
) -> None:
    """A service that listens on a loopback address, or another host's, reached by a header that names it."""
    host, other = target
    where = scene.net.peer if host in ("10.99.0.1", "fd99::1") else scene.net.host
    source = (STRANGER if sender == "stranger" else TRUSTED)[family]
    client = "2001:db8::1" if ":" in host else "203.0.113.1"
    with contextlib.ExitStack() as stack:
        servers = []
        if other == 7777:
            servers = stack.enter_context(serving(scene.net, where, other, relay_net.say_who("hidden"), host))
        data = header(client, host, other) + REQUEST
        answer = exchange(scene.net, scene.net.peer, (HOST[family], port), data, source)
        assert b"hidden" not in answer
        assert [peer for server in servers for peer in server.peers] == []
    if sender == "stranger":
        assert answer == b""
    else:
        assert f'"local": ["{HOST[family]}", {port}]'.encode() in answer


def test_a_link_local_address_is_no_end_of_it(scene: Scene) -> None:
    """With a scope, Envoy cannot write it into a PROXY protocol header of version 2: it ended, with all connections."""
    net = scene.net
    for port in (8012, 8013):
        for destination in (HOST[6], link_local(net, net.host)):
            with net.inside(net.peer), socket.socket(socket.AF_INET6) as client:
                client.settimeout(relay_net.TIMEOUT)
                scope = socket.if_nametoindex("eth0")
                client.bind((link_local(net, net.peer), 0, 0, scope))
                with contextlib.suppress(ConnectionError):
                    client.connect((destination, port, 0, scope if destination.startswith("fe80") else 0))
                    client.sendall(REQUEST)
                    assert client.recv(10) == b""
    for header in (b"PROXY TCP6 fe80::1%lo fd99::2 1 1\r\n", b"PROXY TCP6 fd99::7 fe80::2%lo 1 1\r\n"):
        assert exchange(net, net.peer, (HOST[6], 8014), header + REQUEST, TRUSTED[6]) == b""
    for port in (8012, 8013):
        assert curl(net, net.peer, HOST[6], port, source=STRANGER[6]).status == 200
    assert scene.envoy.process.poll() is None


@FAMILIES
def test_metadata_services_are_not_dialled(scene: Scene, family: int) -> None:
    address = {4: "169.254.169.254", 6: "fd00:ec2::254"}[family]
    route = ["ip", "-n", scene.net.host, "-6"] if family == 6 else ["ip", "-n", scene.net.host]
    gateway = {4: relay_net.PEER4, 6: relay_net.PEER6}[family]
    relay_net.run(*route, "route", "add", address, "via", gateway)
    scene.net.add_address(scene.net.peer, address, "lo")
    try:
        for port in (80, 8201, 8202, 8204):
            servers = [relay_net.Server(scene.net.listen(scene.net.peer, (address, port)), relay_net.echo)] \
                if port == 80 else []  # fmt: skip
            assert curl(scene.net, scene.net.host, address, port).status == 0
            assert all(server.peers == [] for server in servers)
            for server in servers:
                server.close()
    finally:
        relay_net.run("ip", "-n", scene.net.peer, "addr", "delete", address, "dev", "lo")
        relay_net.run(*route, "route", "delete", address)


def test_requests_that_are_two_for_somebody_else(scene: Scene) -> None:
    """Smuggling: both lengths, and a chunk that is none."""
    for data in (
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhelloX",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ):
        answer = exchange(scene.net, scene.net.peer, (HOST[4], 8001), data, begin=True)
        assert b" 200 " not in answer.partition(b"\r\n")[0] + b" ", answer


@pytest.mark.parametrize(
    "line",
    ["OPTIONS * HTTP/1.1", "CONNECT h:80 HTTP/1.1", "GET http://h/ HTTP/1.1", "GET  / HTTP/1.1", "GET \\ HTTP/1.1",
     "GET //h/ HTTP/1.1", "GET ?x HTTP/1.1", "PRI * HTTP/2.0", "GET / HTTP/1.0", "get / HTTP/1.1", "GET /"],
)  # fmt: skip
def test_no_form_of_a_request_is_a_way_around_the_token(scene: Scene, line: str) -> None:
    data = line.encode() + b"\r\nHost: h\r\nConnection: close\r\n\r\n"
    answer = exchange(scene.net, scene.net.peer, (HOST[4], 8005), data, TRUSTED[4], begin=True)
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert b"headers" not in answer


def test_a_slow_client_is_no_way_around_the_token(scene: Scene) -> None:
    with scene.net.connect(scene.net.peer, (HOST[4], 8005)) as client:
        client.settimeout(2)
        with contextlib.suppress(socket.timeout):
            assert client.recv(10) == b""
        client.settimeout(relay_net.TIMEOUT)
        client.sendall(REQUEST)
        assert client.recv(100).startswith(b"HTTP/1.1 401")
