"""TLS of clients and to upstreams: who has to show what, and that nothing gets around it."""

from __future__ import annotations

import ssl

import pytest

from tests.netns.envoy.conftest import FAMILIES, HOST, Scene
from tests.netns.envoy.scene import Answer, curl, exchange, headers
from tests.netns.relay.certificates import client_context

pytestmark = pytest.mark.root


def ask(scene: Scene, family: int, port: int, *options: str, certificate: str | None = "client") -> Answer:
    own = ("--cert", f"{scene.folder}/{certificate}.pem", "--key", f"{scene.folder}/{certificate}.key")
    options = (*options, "--cacert", str(scene.pki.root.path), "--resolve", f"server.test:{port}:{HOST[family]}")
    return curl(scene.net, scene.net.peer, "server.test", port, *options, *(own if certificate else ()), scheme="https")


@FAMILIES
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_client_with_a_certificate_gets_in_and_is_told_of(scene: Scene, family: int, version: str) -> None:
    forged = headers('X-Forwarded-Client-Cert: Subject="CN=root"')
    asked = ask(scene, family, 8020, f"--tlsv{version}", "--tls-max", version, *forged).asked
    (told,) = asked.header("x-forwarded-client-cert")
    assert 'Subject="CN=client"' in told
    assert "root" not in told
    assert asked.header("x-forwarded-proto") == ["https"]


@FAMILIES
def test_clients_without_one_or_with_a_strangers_do_not(scene: Scene, family: int) -> None:
    scene.pki.other.issue("foreign")
    for certificate in (None, "foreign"):
        for port in (8020, 8021):
            assert ask(scene, family, port, certificate=certificate).status == 0
    assert ask(scene, family, 8020, "--tls-max", "1.1").status == 0


@FAMILIES
@pytest.mark.parametrize("port", [8020, 8021])
def test_plain_http_on_such_a_port_reaches_nobody(scene: Scene, family: int, port: int) -> None:
    assert curl(scene.net, scene.net.peer, HOST[family], port).status == 0
    assert b"200" not in exchange(scene.net, scene.net.peer, (HOST[family], port), b"GET / HTTP/1.0\r\n\r\n")


def handshake(scene: Scene, port: int, certificate: tuple[object, object]) -> bool:
    context = client_context(scene.pki, certificate)  # type: ignore[arg-type]
    with scene.net.connect(scene.net.peer, (HOST[4], port)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="server.test") as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                return client.recv(100).startswith(b"HTTP/1.1 200")
        except (ssl.SSLError, ConnectionError):
            return False


def test_the_depth_is_counted_as_nginx_counts_it(scene: Scene) -> None:
    """8020 allows one intermediate certificate, the default; 8021 none."""
    by_root = scene.pki.root.issue("by-root")
    by_middle = scene.pki.client
    by_deep = scene.pki.deep.issue("by-deep")
    assert [handshake(scene, 8020, one) for one in (by_root, by_middle, by_deep)] == [True, True, False]
    assert [handshake(scene, 8021, one) for one in (by_root, by_middle)] == [True, False]


@FAMILIES
def test_an_upstream_is_verified_and_shown_our_certificate(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.peer, HOST[family], 8040).asked
    assert asked["client_certificate"] == {"commonName": "client"}


@FAMILIES
@pytest.mark.parametrize("port", [8041, 8042], ids=["another name", "another authority"])
def test_an_upstream_that_cannot_be_verified_gets_nothing(scene: Scene, family: int, port: int) -> None:
    answer = curl(scene.net, scene.net.peer, HOST[family], port)
    assert answer.status == 503
    assert "certificate" not in answer.body.lower()


@FAMILIES
def test_the_original_destination_may_be_spoken_to_with_tls(scene: Scene, family: int) -> None:
    asked = curl(scene.net, scene.net.peer, HOST[family], 8043).asked
    assert asked["local"] == [HOST[family], 8043]
