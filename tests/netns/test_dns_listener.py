"""Queries that are sent to the data plane's DNS listener itself: by its health checks, or by eBPF programs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, RELAY_UID, RELAY_USER, Net
from tests.netns.test_bound_sockets import ENGINES, FAMILIES, LOOPBACK
from tpctl.host import conntrack
from tpctl.host.conntrack import Flow

pytestmark = pytest.mark.root
PORT, LISTENER = 40053, 15053
"""A source port that two clients have, one after the other; and the listener's."""
APPLICATION, DATA_PLANE = 0, RELAY_UID
CAPTURED = 2
"""The conntrack zone of redirected queries (docs/ruleset.md)."""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        yield network


def datagram(net: Net, uid: int, address: tuple[str, int]) -> socket.socket:
    """A UDP socket on the host that a user has made: what rules ask for is the maker."""
    with net.inside(net.host):
        os.seteuid(uid)
        try:
            made = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM)
            made.bind(address)
        finally:
            os.seteuid(0)
    made.settimeout(relay_net.TIMEOUT)
    return made


def is_answered(net: Net, uid: int, source: str, server: tuple[str, int], listener: socket.socket) -> bool:
    """Whether the listener's answer to a query from `PORT` comes back."""
    with datagram(net, uid, (source, PORT)) as client:
        client.connect(server)
        client.send(b"?")
        listener.sendto(b"!", listener.recvfrom(64)[1])
        try:
            return client.recv(64) == b"!"
        except TimeoutError:
            return False


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("guard", "uid"), [((), DATA_PLANE), (("--no-guard-ports",), APPLICATION)])
def test_it_answers_from_a_port_that_a_redirected_query_had(
    net: Net, engine: str, family: socket.AddressFamily, guard: tuple[str, ...], uid: int
) -> None:
    """NAT remembers the redirected query, to which it gave the listener's own address as its source (d5)."""
    with net.inside(net.host):
        lab.tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES[engine], "--redirect-all-dns-traffic",
                  *guard)  # fmt: skip
    with datagram(net, DATA_PLANE, (LOOPBACK[family], LISTENER)) as listener:
        for _ in range(2):
            assert is_answered(net, APPLICATION, HOST[family], (PEER[family], 53), listener)
            assert is_answered(net, uid, LOOPBACK[family], (LOOPBACK[family], LISTENER), listener)


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
@pytest.mark.parametrize("engine", ENGINES)
def test_only_redirected_queries_that_were_answered_are_forgotten(
    net: Net, engine: str, family: socket.AddressFamily
) -> None:
    """As in a change to eBPF programs, which answer to the same ports."""
    client = socket.inet_pton(family, HOST[family]), PORT
    flow = Flow(*client, socket.inet_pton(family, PEER[family]), 53)

    def is_known() -> bool:
        return conntrack.reply_of(flow, socket.IPPROTO_UDP, CAPTURED) is not None

    with net.inside(net.host):
        lab.tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES[engine], "--redirect-all-dns-traffic")
    with datagram(net, DATA_PLANE, (LOOPBACK[family], LISTENER)) as listener:
        assert is_answered(net, APPLICATION, HOST[family], (PEER[family], 53), listener)
        with net.inside(net.host):
            assert is_known()
            conntrack.forget_answered(LISTENER, deadline=time.monotonic() + relay_net.TIMEOUT)
            assert not is_known()
        with datagram(net, APPLICATION, (HOST[family], PORT)) as waiting:
            waiting.connect((PEER[family], 53))
            waiting.send(b"?")
            listener.recvfrom(64)
            with net.inside(net.host):
                conntrack.forget_answered(LISTENER, deadline=time.monotonic() + relay_net.TIMEOUT)
                assert is_known()
