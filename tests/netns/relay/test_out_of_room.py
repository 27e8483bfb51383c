"""Reloads and restarts while clients have taken every descriptor: they are done, and nothing is lost by them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, client_context
from tests.netns.relay.net import HOST4, Net, Relay
from tests.netns.relay.test_listeners import serving, written
from tests.netns.relay.test_operation import rewrite

pytestmark = pytest.mark.root
LIMIT = 128
"""Of which the relay keeps 16 back."""
CLIENTS = 90
"""Of a worker: more than it can serve."""
TEXT = """
workers: {workers}
drain_timeout: 1s
listeners:
  - {{listen: "*:1101", direction: inbound, upstream: "127.0.0.1:8080"}}
"""
MORE = """  - listen: "*:1443 ssl"
    direction: inbound
    upstream: 127.0.0.1:8080
    ssl: {{certificate: {certificate}, certificate_key: {key}}}
  - {{listen: "*:1102", direction: dns, access: {{allow: [0.0.0.0/0]}}}}
dns: {{zone_file: {zone}}}
metrics: 127.0.0.1:9902
"""
QUERY = bytes.fromhex("abcd 0100 0001 0000 0000 0000 0161 046d657368 00 0001 0001")
"""a.mesh A"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@contextlib.contextmanager
def crowded(net: Net, running: Relay, count: int) -> Iterator[None]:
    """So many clients that accepting is paused."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(ConnectionError):  # the last one whom there was room to accept
                stack.enter_context(net.connect(net.peer, (HOST4, 1101))).sendall(b"x")
        running.wait_for("out of resources, accepting is paused")
        time.sleep(0.3)
        yield


def wait_until_served(net: Net) -> None:
    """Until those that have gone are forgotten, somebody may be accepted for whom there is no room any more."""
    relay_net.until(lambda: is_served(net))


def is_served(net: Net, pki: Pki | None = None) -> bool:
    """Whether somebody is; with TLS where there are certificates."""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError), contextlib.ExitStack() as stack:
        client: socket.socket = stack.enter_context(net.connect(net.peer, (HOST4, 1443 if pki else 1101)))
        if pki is not None:
            client = stack.enter_context(client_context(pki).wrap_socket(client, server_hostname="server.test"))
        client.sendall(b"x")
        return client.recv(1) == b"x"
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_finds_room(net: Net, directory: Path, workers: int) -> None:
    pki = Pki(directory)
    certificate, key = pki.server
    zone = directory / "zone.yaml"
    zone.write_text("names: {a.mesh: 10.0.0.7}")
    text = TEXT.format(workers=workers)
    path = written(directory, text)
    with (
        serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo),
        relay_net.relay(
            net, directory, "--config", str(path), prefix=("prlimit", f"--nofile={LIMIT}:{LIMIT}")
        ) as running,
    ):
        with crowded(net, running, CLIENTS * workers):
            rewrite(running, directory, text + MORE.format(certificate=certificate, key=key, zone=zone))
        wait_until_served(net)
        wait_for_zone(net)
        relay_net.until(lambda: is_served(net, pki))  # another worker may still be forgetting
        assert not [line for line in running.lines() if line["level"] == "error"]


def wait_for_zone(net: Net) -> None:
    """It is read as soon as there is room."""
    with net.datagram(net.peer, socket.AF_INET) as asking:
        asking.settimeout(1)
        end = time.monotonic() + relay_net.PATIENCE
        while time.monotonic() < end:
            asking.sendto(QUERY, (HOST4, 1102))
            with contextlib.suppress(TimeoutError):
                if asking.recv(500).endswith(bytes([10, 0, 0, 7])):
                    return
            time.sleep(0.1)
        pytest.fail("the zone that the reload has named is not served")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_finds_room(net: Net, directory: Path, workers: int) -> None:
    path = written(directory, TEXT.format(workers=workers))
    limited = ("prlimit", f"--nofile={LIMIT}:{LIMIT}")
    with serving(net, net.host, ("127.0.0.1", 8080), relay_net.echo):
        running = Relay(net, directory, "--config", str(path), prefix=limited)
        try:
            running.wait_for("ready")
            with crowded(net, running, CLIENTS * workers):
                running.process.send_signal(signal.SIGUSR2)
                successor = int(running.wait_for("handed over")["successor"])
        finally:
            running.stop(signal.SIGQUIT)
        try:
            wait_until_served(net)
        finally:
            os.kill(successor, signal.SIGQUIT)
            relay_net.until(lambda: not relay_net.is_running(successor))
