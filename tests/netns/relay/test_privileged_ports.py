"""A client of this host with a source port below 1024 is dialled on from one: NFS and rsh servers refuse all others."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, PEER, PEER4, TIMEOUT, Net, Relay
from tests.netns.relay.test_listeners import configured
from tests.netns.relay.test_tcp import FAMILIES, serving

pytestmark = pytest.mark.root
PRIVILEGED = range(1, 1024)
LOW, HIGH = 700, 40700


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def running(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with relay_net.relay(net, tmp_path_factory.mktemp("relay"), "--access-log") as started:
        yield started


def say_port(client: socket.socket, peer: Any) -> None:
    """A service that tells the client's port."""
    client.sendall(str(peer[1]).encode())


@contextmanager
def calling(net: Net, name: str, address: tuple[str, int], port: int) -> Iterator[socket.socket]:
    """A connection from a namespace and a source port."""
    with net.inside(name):
        client = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    with client:
        client.settimeout(TIMEOUT)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("", port))
        client.connect(address)
        yield client


@pytest.mark.parametrize("family", FAMILIES)
def test_a_privileged_client_stays_one(net: Net, running: Relay, family: socket.AddressFamily) -> None:
    server = (PEER[family], 2049)
    with serving(net.listen(net.peer, server), say_port):
        # At the same time, so that the ports differ.
        with calling(net, net.host, server, LOW) as first, calling(net, net.host, server, LOW + 1) as second:
            seen = [int(relay_net.read_all(client)) for client in (first, second)]
            assert set(seen) <= set(PRIVILEGED)
            assert len(set(seen)) == len(seen)
        with calling(net, net.host, server, HIGH) as client:
            assert int(relay_net.read_all(client)) not in PRIVILEGED
    assert all(line["error"] is None for line in running.lines() if line["event"] == "connection")


def test_the_right_is_all_that_is_left_of_root(running: Relay) -> None:
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    assert re.findall(r"Cap(?:Prm|Eff|Bnd):\s+(\w+)", status) == ["0000000000000400"] * 3


def test_a_client_from_elsewhere_gets_no_privileged_port(net: Net, tmp_path: Path) -> None:
    text = f"""
listeners: [{{listen: "*:16001", direction: outbound, upstream: "{PEER4}:7432"}}]
"""
    with (
        configured(net, tmp_path, text),
        serving(net.listen(net.peer, (PEER4, 7432)), say_port),
        calling(net, net.peer, (HOST4, 16001), LOW) as client,
    ):
        assert int(relay_net.read_all(client)) not in PRIVILEGED


def test_without_the_right_it_is_an_ordinary_port(tmp_path: Path) -> None:
    without = ("setpriv", "--bounding-set=-net_bind_service", f"--reuid={relay_net.RELAY_USER}", "--clear-groups")
    server = (PEER4, 2049)
    with (
        relay_net.network() as net,
        relay_net.relay(net, tmp_path, user=None, prefix=without),
        serving(net.listen(net.peer, server), say_port),
        calling(net, net.host, server, LOW) as client,
    ):
        assert int(relay_net.read_all(client)) not in PRIVILEGED
