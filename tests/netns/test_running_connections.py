"""Connections that carry data when this host's first rules come and when the last ones go.

conntrack was never asked before: it picks the connections up in the middle, in either direction or in both at once, and
takes segments that are under way for new connections. None may be cut, come to a halt, or get a wrong byte.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.lab import APP, PROXY_USER, tpctl
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, Layout
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

PATIENCE_SECONDS = 60.0
PERIOD = 251
"""Prime, so that a lost, repeated or exchanged segment does not look like the right one."""
CHUNK = PERIOD * 64
PACES_SECONDS = (0.002, 0.5)
"""One of each kind is busy while rules come, and conntrack knows it before they hold; the other one is idle."""
CONTENT = bytes(range(PERIOD)) * (2 * CHUNK // PERIOD)
ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables-nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables-legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}


class Transfer:
    """One direction of a connection."""

    def __init__(self, sender: socket.socket, receiver: socket.socket, pace: float) -> None:
        self.sender, self.receiver, self.pace = sender, receiver, pace
        self.moved = 0
        self.failure = ""

    def send(self, stop: threading.Event) -> None:
        """Send until told to stop, a little at a time."""
        try:
            while not stop.wait(self.pace):
                self.sender.sendall(CONTENT[:CHUNK])
            self.sender.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.failure = self.failure or f"sending after {self.moved} bytes: {error}"

    def receive(self) -> None:
        """Receive to the end, and compare."""
        try:
            while block := self.receiver.recv(CHUNK):
                place = self.moved % PERIOD
                assert block == CONTENT[place : place + len(block)], f"wrong bytes after {self.moved}"
                self.moved += len(block)
        except (OSError, AssertionError) as error:
            self.failure = self.failure or f"receiving after {self.moved} bytes: {error}"


class Traffic:
    """Transfers that run until the block ends, and have then to end well."""

    def __init__(self, transfers: list[Transfer]) -> None:
        self.transfers = transfers

    def goes_on(self) -> None:
        """AssertionError unless something more arrives of every one."""
        before = [transfer.moved for transfer in self.transfers]
        deadline = time.monotonic() + PATIENCE_SECONDS
        for transfer, moved in zip(self.transfers, before, strict=True):
            while transfer.moved == moved:
                assert not transfer.failure, transfer.failure
                assert time.monotonic() < deadline, f"nothing more after {moved} bytes"
                time.sleep(PACES_SECONDS[0])


@contextlib.contextmanager
def traffic(lab: Lab) -> Iterator[Traffic]:
    """Connections that arrive at the host and that it has opened, of both families."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        transfers: list[Transfer] = []
        for family in Family:
            transfers += _connected(lab, stack, family, 8080, arriving=True)
            transfers += _connected(lab, stack, family, 443, arriving=False)
        threads = [threading.Thread(target=transfer.send, args=(stop,)) for transfer in transfers]
        threads += [threading.Thread(target=transfer.receive) for transfer in transfers]
        for thread in threads:
            thread.start()
        try:
            yield Traffic(transfers)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert [transfer.failure for transfer in transfers if transfer.failure] == []


def _connected(
    lab: Lab, stack: contextlib.ExitStack, family: Family, port: int, *, arriving: bool
) -> Iterator[Transfer]:
    """Both directions of a connection for each pace."""
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    place, address = (HOST, HOST_ADDRESS[family]) if arriving else (PEER, PEER_ADDRESS[family])
    with lab.inside(place):
        server = stack.enter_context(socket.create_server((str(address), port), family=kind))
    for pace in PACES_SECONDS:
        with lab.inside(PEER) if arriving else lab.inside(HOST, APP):
            client = stack.enter_context(socket.create_connection((str(address), port), PATIENCE_SECONDS))
        accepted = stack.enter_context(server.accept()[0])
        accepted.settimeout(PATIENCE_SECONDS)
        yield Transfer(client, accepted, pace)
        yield Transfer(accepted, client, pace)


@pytest.fixture
def resolvers(tmp_path: Path) -> Path:
    """Name servers of both families, so that there are rules with conntrack zones too."""
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 192.0.2.53\nnameserver 2001:db8::53\n")
    return file


@pytest.mark.parametrize("engine", ENGINES)
def test_connections_outlive_the_first_rules_and_the_last(engine: str, resolvers: Path) -> None:
    with Lab(Layout()) as lab, traffic(lab) as busy:
        busy.goes_on()
        for _ in range(2):  # the second time, conntrack still has entries that nobody has kept
            with lab.inside(HOST):
                tpctl(
                    "install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine],
                    "--redirect-dns", "--resolv-conf", str(resolvers),
                )  # fmt: skip
            busy.goes_on()
            with lab.inside(HOST):
                tpctl("uninstall")
            busy.goes_on()
