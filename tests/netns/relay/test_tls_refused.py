"""Clients that are not served, and have not begun to be: before a TLS handshake, so that it costs nothing, or in it."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, client_context
from tests.netns.relay.net import HOST4, PEER4, Net
from tests.netns.relay.test_listeners import configured, serving
from tests.netns.relay.test_operation import scrape

pytestmark = pytest.mark.root
DENIED = "10.99.0.9"
TEXT = """
workers: {workers}
timeouts: {{handshake: 1h}}
listeners:
  - listen: "*:1443 ssl"
    direction: inbound
    upstream: 127.0.0.1:8080
    ssl: {{certificate: {certificate}, certificate_key: {key}}}
    access: {{deny: [{denied}]}}
    limits: {{connections_per_source: 2}}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        made.add_address(made.peer, f"{DENIED}/24")
        yield made


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with relay_net.public_directory() as made:
        yield made


@pytest.fixture(scope="module")
def pki(directory: Path) -> Pki:
    return Pki(directory)


def is_reset(net: Net, source: str | None = None, patience: float = 0.5) -> bool:
    """Whether a client that says nothing is reset, rather than waited for."""
    try:
        with net.connect(net.peer, (HOST4, 1443), source) as client:
            client.settimeout(patience)
            return client.recv(1) == b"never"
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def is_served(net: Net, context: ssl.SSLContext) -> bool:
    try:
        with (
            net.connect(net.peer, (HOST4, 1443)) as plain,
            context.wrap_socket(plain, server_hostname="server.test") as client,
        ):
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except (ConnectionError, ssl.SSLEOFError):
        return False


def test_who_is_still_being_heard_when_the_relay_ends_is_said_to_be_ended_by_it(
    net: Net, directory: Path, pki: Pki
) -> None:
    certificate, key = pki.server
    text = TEXT.format(workers=1, certificate=certificate, key=key, denied=DENIED)
    text += f'  - {{listen: "*:1444 proxy_protocol", direction: inbound, trusted_ips: [{PEER4}]}}\n'
    with configured(net, directory, "metrics: 127.0.0.1:9902\n" + text) as running:
        shaking, greeting = (net.connect(net.peer, (HOST4, port)) for port in (1443, 1444))
        with shaking, greeting:
            shaking.sendall(b"\x16\x03\x01")
            greeting.sendall(b"PROXY TCP4")
            active = [f'connections_active{{listener="inbound-{port}"}}' for port in (1443, 1444)]
            relay_net.until(lambda: [scrape(net, 9902)[name] for name in active] == [1, 1])
            assert running.stop() == 0  # after a drain of 0.2 s
            for client in (shaking, greeting):
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        lines = {line["listener"]: line["reason"] for line in running.lines() if line["event"] == "connection"}
    assert set(lines) == {"inbound-1443", "inbound-1444"}
    assert set(lines.values()) == {"ended by the relay before it was served"}


@pytest.mark.parametrize("workers", [1, 2])
def test_who_is_refused_anyway_gets_no_handshake(net: Net, directory: Path, pki: Pki, workers: int) -> None:
    certificate, key = pki.server
    text = TEXT.format(workers=workers, certificate=certificate, key=key, denied=DENIED)
    with (
        configured(net, directory, "metrics: 127.0.0.1:9902\n" + text) as running,
        serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo),
        contextlib.ExitStack() as stack,
    ):
        assert is_reset(net, DENIED, relay_net.TIMEOUT)
        assert running.wait_for("refused: the source is denied")["client"] == DENIED
        silent = [stack.enter_context(net.connect(net.peer, (HOST4, 1443))) for _ in range(2)]
        # Connections that say nothing are counted. A worker that had not got to one of these would refuse it instead of
        # the next.
        relay_net.until(lambda: scrape(net, 9902)['connections_active{listener="inbound-1443"}'] == len(silent))
        assert is_reset(net, patience=relay_net.TIMEOUT)
        assert running.wait_for("refused: the source has too many connections")["client"] == PEER4
        for one in silent:
            one.close()
        context = client_context(pki)
        relay_net.until(lambda: is_served(net, context))  # connections that have gone are not counted any more
