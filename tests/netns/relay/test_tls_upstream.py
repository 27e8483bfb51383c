"""TLS from the relay to its upstreams: verified, with a certificate of its own, and given up in time."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, server_context
from tests.netns.relay.net import HOST4, PEER4, Net
from tests.netns.relay.test_listeners import configured, serving

pytestmark = pytest.mark.root
BULK = 3 * 1024 * 1024 + 321


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with relay_net.public_directory() as directory:
        yield Pki(directory)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """What the relay reads again when it runs as its user."""
    with relay_net.public_directory() as directory:
        yield directory


def originating(more: str) -> str:
    return f"""
listeners:
  - {{listen: "*:1080", direction: outbound, upstream: "{PEER4}:8443", upstream_tls: {{{more}}}}}
"""


@contextlib.contextmanager
def tls_server(
    net: Net, server: tuple[Path, Path], serve: relay_net.Service, client_ca: Path | None = None
) -> Iterator[None]:
    context = server_context(server)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)

    def wrapped(client: socket.socket, peer: object) -> None:
        with context.wrap_socket(client, server_side=True) as secure:
            serve(secure, peer)
            with contextlib.suppress(OSError):
                secure.unwrap()

    with serving(net, net.peer, (PEER4, 8443), wrapped):
        yield


def answer_of(net: Net, patience: float = relay_net.TIMEOUT) -> bytes:
    """What a plain client gets from the TLS server behind the relay; nothing when the relay refuses."""
    try:
        with net.connect(net.host, (HOST4, 1080)) as client:
            client.settimeout(patience)
            client.sendall(b"hello")
            return client.recv(5)
    except ConnectionResetError:
        return b""


def test_the_certificate_of_an_upstream_is_verified(net: Net, tmp_path: Path, pki: Pki) -> None:
    ca, other = f"ca_file: {pki.root.path}", f"ca_file: {pki.other.path}"
    named = pki.middle.issue("named", "DNS:only.test")
    deep = pki.deep.issue("deep-server", f"IP:{PEER4}")
    for server, more, reason in (
        (pki.server, ca, None),
        (pki.server, f"{ca}, server_name: server.test", None),
        (pki.server, f"{ca}, server_name: another.test", "Hostname mismatch"),
        (pki.server, other, "unable to get"),
        (pki.server, "", "unable to get"),
        (named, ca, "IP address mismatch"),
        (named, f"{ca}, server_name: only.test", None),
        (named, "tls_verify: false", None),
        (deep, ca, "2 intermediate certificates, and 1 are allowed"),
        (deep, f"{ca}, tls_verify_depth: 2", None),
    ):
        with (
            tls_server(net, server, relay_net.echo),
            configured(net, tmp_path, originating(more)) as running,
        ):
            assert answer_of(net) == (b"" if reason else b"hello"), more
            if reason:
                line = running.wait_for("connection")
                assert line["reason"] == "the TLS handshake with the upstream failed"
                assert reason in line["error"], line


def test_the_relay_shows_its_own_certificate(net: Net, tmp_path: Path, pki: Pki) -> None:
    certificate, key = pki.client
    ca = f"ca_file: {pki.root.path}"
    own = f"{ca}, certificate: {certificate}, certificate_key: {key}"
    with tls_server(net, pki.server, relay_net.echo, client_ca=pki.root.path):
        with configured(net, tmp_path, originating(own)):
            assert answer_of(net) == b"hello"
        with configured(net, tmp_path, originating(ca)):
            assert answer_of(net) == b""


def test_bulk_over_tls_to_the_upstream(net: Net, tmp_path: Path, pki: Pki) -> None:
    with (
        tls_server(net, pki.server, lambda client, _peer: client.sendall(relay_net.pattern(BULK))),
        configured(net, tmp_path, originating(f"ca_file: {pki.root.path}")),
        net.connect(net.host, (HOST4, 1080)) as client,
    ):
        assert relay_net.read_all(client) == relay_net.pattern(BULK)


def test_an_upstream_that_does_not_shake_hands_is_given_up(net: Net, tmp_path: Path, pki: Pki) -> None:
    text = "timeouts: {connect: 500ms}\n" + originating(f"ca_file: {pki.root.path}")
    with (
        serving(net, net.peer, (PEER4, 8443), lambda _client, _peer: time.sleep(relay_net.TIMEOUT)),
        configured(net, tmp_path, text) as running,
    ):
        assert answer_of(net, 9.0) == b"", "ten seconds are the default"
        assert running.wait_for("connection")["error"] == "Connection timed out"
