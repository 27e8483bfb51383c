"""TLS contexts of listeners and upstreams, made of their settings by OpenSSL through the standard library."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.relay.settings.hosts import is_host
from tpctl.relay.settings.model import DEFAULT_DEPTH, ClientTls, ListenerSettings, ServerTls, Settings
from tpctl.system.errors import InputError
from tpctl.system.input_files import require_file

_VERIFY = {"off": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "on": ssl.CERT_REQUIRED}


@dataclass(frozen=True, slots=True)
class Tls:
    """One side's context, and what is checked beyond it."""

    context: ssl.SSLContext
    is_server: bool
    verify_depth: int
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """Both sides of a listener; None where there is no TLS."""

    clients: Tls | None = None
    upstream: Tls | None = None


class ChainTooLongError(ssl.SSLError):
    """A certificate is good, but there are more intermediate ones above it than the configuration allows."""


def load(settings: Settings) -> dict[str, ListenerTls]:
    """The contexts by the name of the listener. Raises InputError with every file that cannot be used."""
    problems: list[str] = []
    found = {listener.name: _of_listener(listener, problems) for listener in settings.listeners}
    if problems:
        raise InputError(problems)
    return found


def problems(server: ServerTls | None, client: ClientTls | None) -> Iterator[str]:
    """What is wrong with the files of the sections ssl and upstream_tls, a line for each, beginning with its key."""
    if server is not None:
        yield from (f"ssl.{line}" for line in _serve(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server))
    if client is not None:
        yield from (f"upstream_tls.{line}" for line in _dial(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), client))


def authorities_problems(name: str, path: Path) -> Iterator[str]:
    """What is wrong with a file of authorities."""
    yield from _authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), name, path)


def _of_listener(listener: ListenerSettings, problems: list[str]) -> ListenerTls:
    clients = upstream = None
    if listener.ssl is not None:
        clients = Tls(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), True, listener.ssl.tls_verify_depth)
        problems += (f"listener {listener.name}: ssl.{line}" for line in _serve(clients.context, listener.ssl))
    own = listener.upstream_tls
    if own is not None:
        depth = DEFAULT_DEPTH if own.tls_verify_depth is None else own.tls_verify_depth
        upstream = Tls(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), False, depth, own.server_name)
        problems += (f"listener {listener.name}: upstream_tls.{line}" for line in _dial(upstream.context, own))
    return ListenerTls(clients, upstream)


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Python sets this one, so that a stream that was cut off would look as if it were complete.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF


def _serve(context: ssl.SSLContext, tls: ServerTls) -> Iterator[str]:
    _harden(context)
    context.verify_mode = _VERIFY[tls.verify_client]
    yield from _own_certificate(context, tls.certificate, tls.certificate_key)
    if tls.client_ca_file is not None:
        yield from _authorities(context, "client_ca_file", tls.client_ca_file)


def _dial(context: ssl.SSLContext, tls: ClientTls) -> Iterator[str]:
    if tls.server_name is not None and not is_host(tls.server_name):
        yield f'server_name: "{tls.server_name}" is not the name of a host, nor an address'
    _harden(context)
    if not tls.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca_file is None:
        context.load_default_certs()
    else:
        yield from _authorities(context, "ca_file", tls.ca_file)
    if tls.certificate is not None and tls.certificate_key is not None:
        yield from _own_certificate(context, tls.certificate, tls.certificate_key)


def _own_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> Iterator[str]:
    unreadable = [line for name, path in (("certificate", certificate), ("certificate_key", key))
                  if (line := _unreadable(name, path))]  # fmt: skip
    yield from unreadable
    if unreadable:
        return
    try:
        # An encrypted key cannot be used by a service: nobody is there to type the password.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        yield f"certificate: {certificate} and {key} are not a certificate and its key in PEM: {_reason(error)}"


def _authorities(context: ssl.SSLContext, name: str, path: Path) -> Iterator[str]:
    if line := _unreadable(name, path):
        yield line
        return
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        yield f"{name}: {path} contains no PEM certificates: {_reason(error)}"


def _unreadable(name: str, path: Path) -> str | None:
    try:
        require_file(path)
    except OSError as error:
        return f"{name}: {path} cannot be read: {error.strerror}"
    return None


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error).replace("_", " ").lower()


def check_depth(connection: ssl.SSLObject, depth: int) -> None:
    """Raise ChainTooLongError when there are more than `depth` certificates between the peer's and a trusted one.

    As SSL_CTX_set_verify_depth(3) counts. The standard library has no way to that call, so the chain is looked at when
    OpenSSL has verified it, before a byte of the application is passed on.
    """
    # Public from Python 3.13 on.
    internal: Any = getattr(connection, "_sslobj", None)
    chain = internal.get_verified_chain() if internal is not None else None
    if chain and len(chain) - 2 > depth:
        raise ChainTooLongError(f"{len(chain) - 2} intermediate certificates, and {depth} are allowed")
