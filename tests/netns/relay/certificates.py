"""Certificates for tests, made by OpenSSL: an authority, one below it, and what they sign."""

from __future__ import annotations

import errno
import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

from tests.netns.relay.net import HOST4, PEER4, for_the_relay

_EXTENSIONS = {
    "authority": "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n",
    "leaf": "basicConstraints=CA:FALSE\nsubjectAltName={names}\n",
}


class Authority:
    """A certificate that signs others. Files are PEM; the relay's user may read them."""

    def __init__(self, directory: Path, name: str, parent: Authority | None = None) -> None:
        self._directory = directory
        self.chain: str
        """Certificates from this one up to, and without, the root."""
        self._certificate, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        _sign(self._certificate, self._key, name, _EXTENSIONS["authority"], parent)
        self.chain = self._certificate.read_text() + parent.chain if parent else ""

    @property
    def path(self) -> Path:
        """Its own certificate."""
        return self._certificate

    @property
    def key(self) -> Path:
        """Its key."""
        return self._key

    def issue(self, name: str, names: str = "DNS:localhost") -> tuple[Path, Path]:
        """A certificate with the chain above it, and its key; `names` are subject alternative names."""
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        _sign(certificate, key, name, _EXTENSIONS["leaf"].format(names=names), self)
        certificate.write_text(certificate.read_text() + self.chain)
        return certificate, key


def _sign(certificate: Path, key: Path, name: str, extensions: str, parent: Authority | None) -> None:
    request, details = certificate.with_suffix(".csr"), certificate.with_suffix(".ext")
    details.write_text(extensions)
    run("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
    run("req", "-new", "-key", str(key), "-subj", f"/CN={name}", "-out", str(request))
    signer = ["-signkey", str(key)] if parent is None else ["-CA", str(parent.path), "-CAkey", str(parent.key)]
    run("x509", "-req", "-in", str(request), *signer, "-days", "2", "-extfile", str(details),
        "-CAcreateserial", "-out", str(certificate))  # fmt: skip
    for_the_relay(key)


def run(*arguments: str) -> None:
    """Run openssl, which must succeed."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class Pki:
    """The authorities of a test, a server's certificate and a client's; in files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = Authority(directory, "root")
        self.middle = Authority(directory, "middle", self.root)
        self.deep = Authority(directory, "deep", self.middle)
        self.other = Authority(directory, "other")
        self.server = self.middle.issue("server", f"DNS:server.test,IP:{HOST4},IP:{PEER4}")
        self.client = self.middle.issue("client")


class _Socket(ssl.SSLSocket):
    """Closes itself when its peer has reset it before the handshake, as wrap_socket() of Python 3.11 forgets to.

    The garbage collector would warn of it while another test runs.
    """

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error


def client_context(pki: Pki | None, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Of a client that trusts the root, or anybody, and may have a certificate of its own."""
    context = ssl.create_default_context(cafile=str(pki.root.path) if pki else None)
    context.sslsocket_class = _Socket
    if pki is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """Of a server that asks for no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = _Socket
    context.load_cert_chain(*certificate)
    return context
