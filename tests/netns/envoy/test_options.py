"""What is said about a listener and about all of them: sockets, limits, TLS, logs, metrics on a unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.netns.envoy.application import answer_http, over_tls, serving
from tests.netns.envoy.scene import Envoy, curl, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, server_context
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, TIMEOUT, Net, Server, until

pytestmark = pytest.mark.root
MOST = 20
TEXT = """
workers: 2
access_log: true
metrics: unix:{there}/own/metrics.sock
limits: {{connections: 20}}
timeouts: {{handshake: 1s}}
listeners:
  - listen: "[::]:15006 ipv6only=off backlog=321 so_keepalive=77s:7s:3 reuseport"
    direction: inbound
    send_proxy_protocol: v1
    services:
      - {{port: 8081, protocol: http, upstream: 127.0.0.1:8082}}
  - listen: "[::]:15001 ipv6only=off"
    direction: outbound
    allow_metadata_addresses: true
    upstream_tls: {{ca_file: {there}/root.pem, server_name: server.test}}
  - name: tls
    listen: "*:8443 ssl"
    direction: inbound
    upstream: 127.0.0.1:8082
    ssl: {{certificate: {there}/server.pem, certificate_key: {there}/server.key}}
  - name: few.er
    listen: 127.0.0.1:8444
    direction: inbound
    upstream: 127.0.0.1:8085
    limits: {{connections: 3}}
"""


class Optional:
    """An Envoy with everything else."""

    def __init__(self, net: Net, envoy: Envoy, pki: Pki) -> None:
        self.net = net
        self.envoy = envoy
        self.pki = pki


@pytest.fixture(scope="module")
def optional() -> Iterator[Optional]:
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(relay_net.network())
        folder = stack.enter_context(relay_net.public_directory())
        pki = Pki(folder)
        envoy = stack.enter_context(running(net, folder, TEXT.format(there=folder)))
        for port in (8080, 8082):
            stack.enter_context(serving(net, net.host, port, answer_http))
        stack.enter_context(serving(net, net.peer, 8083, over_tls(server_context(pki.server), answer_http)))
        yield Optional(net, envoy, pki)


@pytest.mark.parametrize(("host", "peer", "kind"), [(HOST4, PEER4, "TCP4"), (HOST6, PEER6, "TCP6")], ids=["v4", "v6"])
def test_a_listener_sends_proxy_protocol_headers(optional: Optional, host: str, peer: str, kind: str) -> None:
    asked = curl(optional.net, optional.net.peer, host, 8080).asked
    assert asked["proxy"].split()[:4] == ["PROXY", kind, peer, host]


@pytest.mark.parametrize("host", [HOST4, HOST6], ids=["v4", "v6"])
def test_another_upstream_is_dialled_from_the_passthrough_address(optional: Optional, host: str) -> None:
    asked = curl(optional.net, optional.net.peer, host, 8081).asked
    assert (asked["peer"], asked["local"]) == ("127.0.0.6", ["127.0.0.1", 8082])


@pytest.mark.parametrize("host", [PEER4, PEER6], ids=["v4", "v6"])
def test_a_listener_adds_tls(optional: Optional, host: str) -> None:
    assert "client_certificate" in curl(optional.net, optional.net.host, host, 8083).asked


def test_a_listener_terminates_tls_for_those_who_call_it(optional: Optional) -> None:
    """Nobody is redirected to it, and its upstream is named, so it may be called itself."""
    options = ("--cacert", str(optional.pki.root.path), "--connect-to", "server.test:8443:127.0.0.1:8443")
    asked = curl(optional.net, optional.net.host, "server.test", 8443, *options, scheme="https").asked
    assert asked["local"] == ["127.0.0.1", 8082]


def test_a_client_has_some_time_for_its_handshake(optional: Optional) -> None:
    with optional.net.connect(optional.net.host, ("127.0.0.1", 8443)) as client:
        client.settimeout(TIMEOUT)
        assert client.recv(10) == b""


def test_the_words_of_listen(optional: Optional) -> None:
    shown = optional.net.on_host("ss", "-Hltn", "sport = :15006").splitlines()
    assert {line.split()[2] for line in shown} == {"321"}
    with optional.net.connect(optional.net.peer, (HOST4, 8080)) as client:
        client.sendall(b"GET")
        until(
            lambda: (
                "timer:(keepalive,1min" in optional.net.on_host("ss", "-Htno", "sport = :15006", "or", "sport = :8080")
            )
        )


def test_metrics_on_a_unix_socket(optional: Optional) -> None:
    path = optional.envoy.folder / "own/metrics.sock"
    argv = ["curl", "-s", "--unix-socket", str(path), "http://envoy/ready"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.stdout.strip() == "LIVE"
    assert path.stat().st_mode & 0o777 == 0o660


def test_each_request_is_logged_without_its_query(optional: Optional) -> None:
    curl(optional.net, optional.net.peer, HOST4, 8081, path="/logged?token=hidden")

    def lines() -> list[dict[str, object]]:
        whole, _, _ = optional.envoy.log().rpartition("\n")  # the rest is being written
        found = [line for line in whole.splitlines() if line.startswith("{")]
        return [one for one in map(json.loads, found) if one.get("path") == "/logged"]

    until(lines)
    (line,) = lines()
    assert (line["service"], line["status"], line["method"]) == ("inbound-15006~inbound-8081", 200, "GET")
    assert "hidden" not in optional.envoy.log()


def test_a_listener_has_no_more_connections_than_its_own_limit(optional: Optional) -> None:
    """Those beyond it are closed, other listeners are not touched, and there is room when one has ended."""
    net = optional.net
    server = Server(net.listen(net.host, ("127.0.0.1", 8085)), relay_net.echo)

    def is_served(client: socket.socket) -> bool:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"hello")
            return client.recv(5, socket.MSG_WAITALL) == b"hello"
        return False

    def another_is_served() -> bool:
        with net.connect(net.host, ("127.0.0.1", 8444)) as client:
            return is_served(client)

    try:
        with contextlib.ExitStack() as stack:
            # One after the other: two workers may let in one more at the same instant.
            for _ in range(3):
                assert is_served(stack.enter_context(net.connect(net.host, ("127.0.0.1", 8444))))
            assert not another_is_served()
            assert curl(net, net.peer, HOST4, 8080).status == 200
        until(another_is_served)
    finally:
        server.close()


def test_no_more_connections_than_are_allowed(optional: Optional) -> None:
    """Two workers may let in a few more at the same instant, and connections of other tests may not have ended."""
    with contextlib.ExitStack() as stack:
        clients, answered = [], 0
        for _ in range(2 * MOST):
            with contextlib.suppress(ConnectionError):
                clients.append(stack.enter_context(optional.net.connect(optional.net.peer, (HOST4, 8080))))
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                answered += client.recv(100).startswith(b"HTTP/1.1 200")
        assert MOST // 2 <= answered <= MOST + 2
    until(lambda: curl(optional.net, optional.net.peer, HOST4, 8080).status == 200)
