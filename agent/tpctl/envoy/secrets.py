"""Secrets, certificates and authorities as resources (SDS), which name files; Envoy reads these and watches them."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from tpctl.envoy.documents import TYPE, Places, Resource, secret_file
from tpctl.relay.settings.model import ClientTls, Secret, ServerTls

_SECRET = f"{TYPE}extensions.transport_sockets.tls.v3.Secret"


@dataclass(slots=True)
class Secrets:
    """The resources that have been referred to, by their names."""

    places: Places
    settings: dict[str, Secret]
    found: dict[str, Resource] = field(default_factory=dict)

    def generic(self, name: str) -> Resource:
        """A reference to a secret of the settings."""
        path = secret_path(self.settings[name], self.places)
        return self._refer(f"secrets.{name}", {"generic_secret": {"secret": {**_file(path), **_watching(path)}}})

    def certificate(self, name: str, tls: ServerTls | ClientTls) -> Resource:
        """A reference to one's own certificate and its key."""
        assert tls.certificate is not None
        assert tls.certificate_key is not None
        pair = {"certificate_chain": _file(tls.certificate), "private_key": _file(tls.certificate_key)}
        return self._refer(name, {"tls_certificate": {**pair, **_watching(tls.certificate)}})

    def client_authorities(self, name: str, tls: ServerTls) -> Resource:
        """A reference to the authorities of clients' certificates.

        Envoy counts the root as well, unlike nginx and OpenSSL.
        """
        assert tls.client_ca_file is not None
        context: Resource = {**_authorities(tls.client_ca_file), "max_verify_depth": tls.tls_verify_depth + 1}
        return self._refer(name, {"validation_context": context})

    def server_authorities(self, name: str, ca_file: Path | None, server_name: str | None) -> Resource:
        """A reference to the authorities of a server's certificate, and to the name in it."""
        context = _authorities(ca_file or self.places.authorities)
        if server_name is not None:
            kind = "IP_ADDRESS" if is_address(server_name) else "DNS"
            context["match_typed_subject_alt_names"] = [{"san_type": kind, "matcher": {"exact": server_name}}]
        return self._refer(name, {"validation_context": context})

    def _refer(self, name: str, body: Resource) -> Resource:
        self.found[name] = {"@type": _SECRET, "name": name, **body}
        return {"name": name, "sds_config": self.places.watched(secret_file(name))}


def secret_path(secret: Secret, places: Places) -> Path:
    """The file of a secret. A credential without a directory of credentials has a path at which there is nothing."""
    if secret.file is not None:
        return secret.file
    assert secret.credential is not None
    return (places.credentials or Path("/nonexistent")) / secret.credential


def is_address(name: str) -> bool:
    """Whether a server's name is an IP address, which is never sent as SNI (RFC 6066, 3)."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _file(path: Path) -> Resource:
    return {"filename": str(path)}


def _watching(path: Path) -> Resource:
    return {"watched_directory": {"path": str(path.parent)}}


def _authorities(path: Path) -> Resource:
    return {"trusted_ca": _file(path), **_watching(path)}
