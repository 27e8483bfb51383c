"""Certificates for tests, made by OpenSSL: an authority, one below it, and what they sign."""

from __future__ import annotations

import subprocess
from pathlib import Path

_EXTENSIONS = {
    "authority": "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n",
    "leaf": "basicConstraints=CA:FALSE\nsubjectAltName={names}\n",
}


class Authority:
    """A certificate that signs others. Files are PEM, and may be read by everybody."""

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
    key.chmod(0o644)


def run(*arguments: str) -> None:
    """Run openssl, which must succeed."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
