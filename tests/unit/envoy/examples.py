"""A file with everything that Envoy can do, and the files to which it refers."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.netns.relay.certificates import Pki
from tpctl.config.yaml_text import parse_yaml
from tpctl.envoy.documents import Places
from tpctl.envoy.settings import settings_of
from tpctl.relay.settings.model import Settings

EVERYTHING = """
access_log: true
metrics: 127.0.0.1:9902
trusted_ips: [10.99.0.0/24]
limits: {{connections: 1000}}
timeouts: {{connect: 5s, idle: 10m}}
secrets: {{current: {{file: {there}/current}}, previous: {{file: {there}/previous}}}}
listeners:
  - listen: "[::]:15006 ipv6only=off so_keepalive=30s::3 backlog=1000"
    direction: inbound
    access: {{deny: [10.66.0.0/16]}}
    services:
      - port: 8080
        name: web
        protocol: http
        access: {{allow: [10.0.0.0/8, "fd00::/8"], deny: [10.1.0.0/16]}}
        origin_verify: {{header: X-Origin-Verify, secrets: [current, previous]}}
        inject_headers: {{X-Token: {{secret: current}}}}
        jwt:
          issuer: https://issuer.test
          audiences: [one, other]
          jwks_file: {there}/jwks.json
          claims_to_headers: {{sub: X-Subject}}
        rate_limit: {{requests: 10, per: 1s}}
        real_ip_header: X-Real-IP
        preserve_case: true
        send_proxy_protocol: v2
      - port: 443
        name: tls
        protocol: http
        ssl: {{certificate: {there}/server.pem, certificate_key: {there}/server.key, client_ca_file: {there}/root.pem}}
        upstream: 127.0.0.1:8081
        upstream_tls: {{server_name: server.test, ca_file: {there}/root.pem}}
        jwt: {{issuer: x, jwks_uri: "https://127.0.0.1:8443/jwks", jwks_ca_file: {there}/root.pem}}
      - {{port: 25, access: {{allow: [10.0.0.0/8]}}}}
      - {{port: 26, proxy_protocol: true, trusted_ips: [10.99.0.1/32], access: {{deny: [10.9.0.0/16]}}}}
      - {{port: 27, proxy_protocol: true, protocol: http}}
      - {{port: 28, protocol: detect, access: {{deny: [10.9.0.0/16]}}}}
      - {{port: 29, ssl: {{certificate: {there}/server.pem, certificate_key: {there}/server.key}}}}
  - listen: "[::]:15001 ipv6only=off"
    direction: outbound
    access: {{deny: [192.0.2.0/24]}}
    services:
      - {{port: 80, to: [10.0.0.0/8], protocol: http, inject_headers: {{X-Key: {{secret: previous}}}}}}
      - {{port: 80, name: inner, to: [10.1.0.0/16], access: {{deny: [10.1.2.0/24]}}}}
      - {{port: 443, upstream_tls: {{server_name: server.test, ca_file: {there}/root.pem}}, protocol: detect}}
      - {{port: 444, send_proxy_protocol: v1, access: {{allow: [10.0.0.0/8]}}}}
"""


DATAPLANE = """
type: Dataplane
networking:
  inbound:
    - {port: 25, servicePort: 2525}
    - {port: 443, servicePort: 8443, serviceAddress: 127.0.0.1}
    - {port: 9999}
"""


def write_files(there: Path) -> Pki:
    """Certificates, a JWKS and secrets in a directory."""
    pki = Pki(there)
    for name in ("current", "previous"):
        (there / name).write_text(f"secret-{name}")
        (there / name).chmod(0o640)
    write_jwks(there / "jwks.json", new_key(there / "jwt.key"))
    (there / "dataplane.yaml").write_text(DATAPLANE)
    return pki


def new_key(path: Path) -> Path:
    """An RSA key for tokens."""
    subprocess.run(["openssl", "genrsa", "-out", str(path), "2048"], check=True, capture_output=True)
    return path


def write_jwks(path: Path, *keys: Path) -> None:
    """The public parts of keys, as a JWKS."""
    found = []
    for key in keys:
        said = subprocess.run(
            ["openssl", "rsa", "-in", str(key), "-noout", "-modulus"], check=True, capture_output=True, text=True
        )
        modulus = bytes.fromhex(said.stdout.strip().partition("=")[2])
        found.append({"kty": "RSA", "alg": "RS256", "kid": key.name, "n": base64url(modulus), "e": "AQAB"})
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"keys": found}))
    temporary.rename(path)


def token(key: Path, *, algorithm: str = "RS256", expires: int | None = 3600, **claims: Any) -> str:
    """A JWT of a key (RFC 7519) with these claims beside the usual ones. `expires`: in so many seconds."""
    body: dict[str, Any] = {"iss": "https://issuer.test", "aud": "this", "sub": "alice", **claims}
    if expires is not None:
        body["exp"] = int(time.time()) + expires
    head = {"alg": algorithm, "typ": "JWT", "kid": key.name}
    text = ".".join(base64url(json.dumps(part).encode()) for part in (head, body))
    if algorithm == "none":
        return f"{text}."
    argv = ["openssl", "dgst", "-sha256", "-sign", str(key)]
    signature = subprocess.run(argv, input=text.encode(), capture_output=True, check=True).stdout
    return f"{text}.{base64url(signature)}"


def base64url(data: bytes) -> str:
    """RFC 7515, appendix C."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def settings(text: str) -> Settings:
    return settings_of(parse_yaml(text), "e.yaml")


def places(folder: Path) -> Places:
    return Places(folder, folder / "admin.sock")
