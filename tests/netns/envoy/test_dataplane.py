"""`upstream: dataplane`, and upstreams that are this host's own addresses, behind the rules that tpctl installs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.netns import lab
from tests.netns.envoy.application import answer_http, serving
from tests.netns.envoy.scene import Envoy, curl, exchange, running
from tests.netns.envoy.test_client_address import REQUEST, header1
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, RELAY_USER, Net

pytestmark = pytest.mark.root
DATAPLANE = f"""
type: Dataplane
networking:
  inbound:
    - {{port: 8080, servicePort: 9080}}
    - {{port: 8081, servicePort: 9081, serviceAddress: 127.0.0.1}}
    - {{port: 8082, serviceAddress: "{HOST4}"}}
    - {{port: 8083, servicePort: 9083}}
    - {{port: 8084, servicePort: 9084}}
    - {{port: 8085}}
"""
TEXT = """
listeners:
  - listen: "[::]:15006 ipv6only=off"
    direction: inbound
    upstream: dataplane
    dataplane_file: {there}/dataplane.yaml
    access: {{deny: [10.99.0.66]}}
    services:
      - {{port: 8083, protocol: http, real_ip_header: X-Real-IP}}
      - {{port: 8084, proxy_protocol: true, trusted_ips: [{peer4}, "{peer6}"]}}
      - {{port: 8087, protocol: http}}
      - {{port: 8088, protocol: http, upstream: "{host4}:8088"}}
      - {{port: 8089, upstream: "{host4}:8089"}}
"""
OTHER = "10.99.0.66"


class Scene:
    """What a test needs."""

    def __init__(self, net: Net, envoy: Envoy) -> None:
        self.net = net
        self.envoy = envoy

    def local(self, host: str, port: int) -> tuple[str, list[object]]:
        """Who has called the application, and where."""
        asked = curl(self.net, self.net.peer, host, port).asked
        return asked["peer"], asked["local"]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(relay_net.network(redirect=False, passthrough6=False))
        net.add_address(net.peer, f"{OTHER}/24")
        folder = stack.enter_context(relay_net.public_directory())
        (folder / "dataplane.yaml").write_text(DATAPLANE)
        for port in (9080, 9083, 9084, 8082, 8085, 8086, 8087, 8088, 8089):
            stack.enter_context(serving(net, net.host, port, answer_http))
        stack.enter_context(serving(net, net.host, 9081, answer_http, "127.0.0.1"))
        text = TEXT.format(there=folder, peer4=PEER4, peer6=PEER6, host4=HOST4)
        envoy = stack.enter_context(running(net, folder, text))
        with net.inside(net.host):
            lab.tpctl("install", "--kuma-dp-user", RELAY_USER, "--engine", "nftables")
        try:
            yield Scene(net, envoy)
        finally:
            with net.inside(net.host):
                lab.tpctl("uninstall")


@pytest.mark.parametrize(("host", "passthrough"), [(HOST4, "127.0.0.6"), (HOST6, "::6")], ids=["v4", "v6"])
@pytest.mark.parametrize(("port", "service"), [(8080, 9080), (8083, 9083), (8085, 8085), (8086, 8086), (8087, 8087)])
def test_the_address_that_was_called_at_the_port_of_the_service(
    scene: Scene, host: str, passthrough: str, port: int, service: int
) -> None:
    assert scene.local(host, port) == (passthrough, [host, service])


@pytest.mark.parametrize("host", [HOST4, HOST6], ids=["v4", "v6"])
def test_the_address_of_the_service(scene: Scene, host: str) -> None:
    assert scene.local(host, 8081) == ("127.0.0.6", ["127.0.0.1", 9081])


@pytest.mark.parametrize("host", [HOST4, HOST6], ids=["v4", "v6"])
@pytest.mark.parametrize("port", [8082, 8088, 8089])
def test_an_address_of_this_host_is_dialled_from_where_nothing_is_redirected(
    scene: Scene, host: str, port: int
) -> None:
    """Else the connection would come back to Envoy (o3), again and again until there are no descriptors left."""
    assert scene.local(host, port) == ("127.0.0.6", [HOST4, port])


def test_requests_and_proxy_protocol_headers_of_such_ports(scene: Scene) -> None:
    net = scene.net
    assert curl(net, net.peer, HOST4, 8083).asked.header("X-Real-IP") == [PEER4]
    for host, peer, client, elsewhere in (
        (HOST4, PEER4, "203.0.113.9", "127.0.0.1"),
        (HOST6, PEER6, "2001:db8::9", "::1"),
    ):
        said = exchange(net, net.peer, (host, 8084), header1(client, elsewhere, 7) + REQUEST, peer)
        assert b'"local": ["%b", 9084]' % host.encode() in said


def test_the_listeners_own_access_rules_hold(scene: Scene) -> None:
    for port in (8080, 8081):
        assert curl(scene.net, scene.net.peer, HOST4, port, source=OTHER).error
    assert curl(scene.net, scene.net.peer, HOST4, 8083, source=OTHER).status == 200  # a service has rules of its own
