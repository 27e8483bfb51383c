"""The TLS sections of a listener in the relay's YAML file. Whether the files exist is asked when they are loaded."""

from __future__ import annotations

from pathlib import Path

from tpctl.relay.settings import section as read
from tpctl.relay.settings.model import DEFAULT_DEPTH, ClientTls, ServerTls
from tpctl.relay.settings.section import ConfigSection

MAX_DEPTH = 100
"""OpenSSL's own limit (SSL_CTX_set_verify_depth(3))."""
_MISSING = Path("/nonexistent")


def server_tls(section: ConfigSection) -> ServerTls:
    """`ssl`: how TLS of clients is terminated."""
    for key in ("certificate", "certificate_key"):
        if key not in section:
            section.complain(key, "is missing; give the path of a PEM file")
    client_ca_file = section.take("client_ca_file", read.path, None)
    default = "on" if client_ca_file else "off"
    verify_client = section.take("verify_client", read.one_of("off", "optional", "on"), default)
    if verify_client != "off" and "client_ca_file" not in section:
        section.complain("verify_client", f"{verify_client} needs client_ca_file, the CAs of clients' certificates")
    found = ServerTls(
        section.take("certificate", read.path, _MISSING),
        section.take("certificate_key", read.path, _MISSING),
        client_ca_file,
        verify_client,
        section.take("tls_verify_depth", read.whole(0, MAX_DEPTH), DEFAULT_DEPTH),
    )
    section.finish()
    return found


def client_tls(section: ConfigSection) -> ClientTls:
    """`upstream_tls`: how TLS to the upstream is originated."""
    if ("certificate" in section) != ("certificate_key" in section):
        section.complain("certificate", "certificate and certificate_key belong together; give both or neither")
    found = ClientTls(
        section.take("ca_file", read.path, None),
        section.take("tls_verify", read.flag, True),
        section.take("tls_verify_depth", read.whole(0, MAX_DEPTH), None),
        section.take("server_name", read.text, None),
        section.take("certificate", read.path, None),
        section.take("certificate_key", read.path, None),
    )
    section.finish()
    return found
