"""One Envoy with a service for each row of docs/envoy.md, and its surroundings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.envoy.application import answer_http, greet, over_tls, send_file, serving
from tests.netns.envoy.scene import Envoy, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, server_context
from tests.netns.relay.net import Net, for_the_relay
from tests.unit.envoy.examples import new_key, write_jwks

TRUSTED = {4: "10.99.0.1", 6: "fd99::1"}
"""The peer's own addresses: proxies that are believed what they say about their clients."""
STRANGER = {4: "10.99.0.66", 6: "fd99::66"}
"""More addresses of the peer."""
DENIED = {4: "10.99.0.13", 6: "fd99::13"}
HOST = {4: relay_net.HOST4, 6: relay_net.HOST6}

INBOUND = """
workers: 2
secrets: {{current: {{file: {there}/current}}, previous: {{file: {there}/previous}}}}
metrics: 127.0.0.1:9902
trusted_ips: [10.99.0.1/32, "fd99::1/128"]
listeners:
  - name: inbound
    listen: "[::]:15006 ipv6only=off"
    direction: inbound
    access: {{deny: [10.99.0.13/32, "fd99::13/128"]}}
    services:
      - {{port: 8001, protocol: http, real_ip_header: X-Real-IP}}
      - port: 8002
        protocol: http
        access:
          allow: [203.0.113.0/24, "2001:db8:1::/48", 10.99.0.66, "fd99::66"]
          deny: [203.0.113.66, "2001:db8:1::66"]
      - {{port: 8003, protocol: http, origin_verify: {{header: X-Origin-Verify, secrets: [current, previous]}}}}
      - {{port: 8004, protocol: http, inject_headers: {{X-Api-Key: {{secret: current}}}}}}
      - port: 8005
        protocol: http
        jwt:
          issuer: https://issuer.test
          audiences: [this]
          jwks_file: {there}/jwks.json
          claims_to_headers: {{sub: X-Subject, role: X-Role}}
      - port: 8015
        protocol: http
        jwt:
          issuer: https://issuer.test
          jwks_uri: https://127.0.0.1:9444/jwks.json
          jwks_ca_file: {there}/root.pem
          forward: true
      - {{port: 8006, protocol: http, rate_limit: {{requests: 3, per: 1h}}}}
      - {{port: 8007, protocol: http, preserve_case: true}}
      - {{port: 8008, protocol: http, rate_limit: {{requests: 3, per: 1h, by: service}}, trusted_ips: []}}
      - {{port: 8009, protocol: http}}
      - port: 8016
        protocol: http
        trusted_ips: []
        origin_verify: {{header: X-Origin-Verify, secrets: current}}
        rate_limit: {{requests: 2, per: 1h, by: service}}
      - {{port: 8010, proxy_protocol: true, access: {{deny: [203.0.113.66]}}}}
      - {{port: 8011, protocol: http, proxy_protocol: true, real_ip_header: X-Real-IP}}
      - {{port: 8012, send_proxy_protocol: v1}}
      - {{port: 8013, protocol: http, send_proxy_protocol: v2}}
      - {{port: 8014, proxy_protocol: true, send_proxy_protocol: v2}}
      - port: 8020
        protocol: http
        ssl: {{certificate: {there}/server.pem, certificate_key: {there}/server.key, client_ca_file: {there}/root.pem}}
      - port: 8022
        protocol: http
        http2: true
        upstream: 127.0.0.1:8009
        ssl: {{certificate: {there}/server.pem, certificate_key: {there}/server.key}}
      - port: 8021
        ssl:
          certificate: {there}/server.pem
          certificate_key: {there}/server.key
          client_ca_file: {there}/root.pem
          tls_verify_depth: 0
      - {{port: 8030, access: {{deny: [10.99.0.66, "fd99::66"]}}}}
      - {{port: 8032, access: {{allow: [10.99.0.1, "fd99::1"]}}}}
      - {{port: 8031, protocol: detect, access: {{deny: [10.99.0.66, "fd99::66"]}}}}
      - port: 8040
        protocol: http
        upstream: 127.0.0.1:9443
        upstream_tls: {{ca_file: {there}/root.pem, server_name: server.test, certificate: {there}/client.pem,
                        certificate_key: {there}/client.key}}
      - port: 8041
        protocol: http
        upstream: 127.0.0.1:9443
        upstream_tls: {{ca_file: {there}/root.pem, server_name: other.test}}
      - port: 8042
        protocol: http
        upstream: 127.0.0.1:9443
        upstream_tls: {{ca_file: {there}/other.pem, server_name: server.test}}
      - {{port: 8043, protocol: http, upstream_tls: {{ca_file: {there}/root.pem, server_name: server.test}}}}
  - name: outbound
    listen: "[::]:15001 ipv6only=off"
    direction: outbound
    access: {{deny: [10.99.0.13/32, "fd99::13/128"]}}
    services:
      - {{port: 8201, protocol: http, inject_headers: {{X-Api-Key: {{secret: current}}}}}}
      - {{port: 8202, protocol: http, to: [10.99.0.1, "fd99::1"], inject_headers: {{X-Api-Key: {{secret: current}}}}}}
      - {{port: 8203, upstream_tls: {{ca_file: {there}/root.pem, server_name: server.test}}}}
      - {{port: 8204, protocol: detect}}
"""


@dataclass(frozen=True)
class Scene:
    """Everything that a test needs."""

    net: Net
    envoy: Envoy
    folder: Path
    pki: Pki


def secret(folder: Path, name: str, value: str) -> None:
    """A secret as a file that the data plane's user may read, put there by a rename."""
    new = folder / f"{name}.new"
    new.write_text(value)
    for_the_relay(new)
    new.rename(folder / name)


@pytest.fixture(scope="package")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(relay_net.network())
        folder = stack.enter_context(relay_net.public_directory())
        for more in (STRANGER, DENIED):
            net.add_address(net.peer, f"{more[4]}/24")
            net.add_address(net.peer, f"{more[6]}/64", "eth0", "preferred_lft", "0")
        pki = Pki(folder)
        secret(folder, "current", "s3cret-current")
        secret(folder, "previous", "s3cret-previous")
        write_jwks(folder / "jwks.json", new_key(folder / "jwt.key"))
        envoy = stack.enter_context(running(net, folder, INBOUND.format(there=folder)))
        for port in (*range(8001, 8009), *range(8010, 8017), 8020, 8021, 8031, 8041, 8100):
            stack.enter_context(serving(net, net.host, port, answer_http))
        for port in (8030, 8032, 8101):
            stack.enter_context(serving(net, net.host, port, greet))
        context = server_context(pki.server)
        context.load_verify_locations(pki.root.path)
        context.verify_mode = 1  # type: ignore[assignment]  # CERT_OPTIONAL
        secure = over_tls(context, answer_http)
        stack.enter_context(serving(net, net.host, 9443, secure, "127.0.0.1"))
        stack.enter_context(serving(net, net.host, 8043, secure))
        keys = over_tls(server_context(pki.root.issue("keys", "IP:127.0.0.1")), send_file(folder / "jwks.json"))
        stack.enter_context(serving(net, net.host, 9444, keys, "127.0.0.1"))
        for port in (8201, 8202, 8204, 8205):
            stack.enter_context(serving(net, net.peer, port, answer_http))
        stack.enter_context(serving(net, net.peer, 8203, secure))
        yield Scene(net, envoy, folder, pki)


FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
