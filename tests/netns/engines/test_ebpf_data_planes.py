"""The relay and a real Envoy behind the eBPF engine, without any option."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, RELAY_UID, Net
from tests.netns.test_envoy import FAMILIES, PASSTHROUGH, running_envoy, serving
from tpctl.engines.ebpf.engine import EbpfEngine
from tpctl.rehearsal.cgroup import own_place
from tpctl.spec.policy import Dns, DnsCapture, Inbound, Policy, PortRange, WhenProxyDown

pytestmark = pytest.mark.root

POLICY = Policy(RELAY_UID, inbound=Inbound(exclude_ports=(PortRange(22),)), dns=Dns(DnsCapture.ALL))
BULK = 4 * 1024 * 1024 + 321
AWAY_SECONDS = 0.05


@contextlib.contextmanager
def network(policy: Policy = POLICY) -> Iterator[Net]:
    """Two hosts, ours behind the engine; this process and what it starts are in the engine's cgroup."""
    made, before = Net(), set(threading.enumerate())
    with own_place() as place:
        try:
            made.create(redirect=False)
            with made.inside(made.host):
                engine = place.engine()
                assert isinstance(engine, EbpfEngine)
                engine.apply(engine.plan(policy))
            yield made
            with made.inside(made.host):
                engine.remove()
        finally:
            made.remove()
            for thread in set(threading.enumerate()) - before:
                thread.join()  # see `own_mounts`: no thread that was started in them may outlive them


@pytest.fixture(scope="module", params=["envoy", "relay"])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    directory = tmp_path_factory.mktemp("data-plane")
    with network() as made:
        if request.param == "envoy":
            with running_envoy(made, directory / "envoy.log"):
                yield made
        else:
            with relay_net.relay(made, directory):
                yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_goes_through_the_data_plane_to_the_port_that_was_meant(net: Net, family: socket.AddressFamily) -> None:
    address = (HOST[family], 8080)
    with (
        serving(net, net.host, address, relay_net.say_who("application")),
        net.connect(net.peer, address) as client,
    ):
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["application", PASSTHROUGH[family], HOST[family], 8080]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_excluded_port_is_reached_without_it(net: Net, family: socket.AddressFamily) -> None:
    address = (HOST[family], 22)
    with serving(net, net.host, address, relay_net.say_who("sshd")), net.connect(net.peer, address) as client:
        assert json.loads(relay_net.read_all(client)) == ["sshd", PEER[family], HOST[family], 22]


@pytest.mark.parametrize("family", FAMILIES)
def test_outbound_goes_through_it_to_the_server_that_was_meant(net: Net, family: socket.AddressFamily) -> None:
    address = (PEER[family], 8443)
    with (
        serving(net, net.peer, address, relay_net.say_who("server")) as server,
        net.connect(net.host, address) as client,
    ):
        assert client.getpeername()[:2] == address
        own_port = client.getsockname()[1]
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["server", HOST[family], PEER[family], 8443]
    assert [peer[1] for peer in server.peers] != [own_port]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["inbound", "outbound"])
def test_bulk_streams_and_half_close(net: Net, family: socket.AddressFamily, direction: str) -> None:
    inbound = direction == "inbound"
    server, client_side, addresses = (net.host, net.peer, HOST) if inbound else (net.peer, net.host, PEER)
    sent = relay_net.pattern(BULK)
    address = (addresses[family], 9000)
    with serving(net, server, address, relay_net.digest_service(BULK)), net.connect(client_side, address) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = relay_net.read_all(client)
    assert answer == hashlib.sha256(sent).digest() + sent


def _listeners(net: Net) -> str:
    """The data plane's listening sockets in our host's namespace, with the processes that have them."""
    return net.on_host("ss", "-Hltnp", "( sport = :15006 or sport = :15001 )")


def _kill_envoys(net: Net) -> None:
    """Kill them, and wait until their sockets are closed, which the kernel does some time after it took them away."""
    for process in {int(part.split(",")[0]) for part in _listeners(net).split("pid=")[1:]}:
        os.kill(process, signal.SIGKILL)
    while _listeners(net):
        time.sleep(0.01)


def _directly(net: Net) -> list[bool]:
    """Whether connections go straight to where they are meant to: in, out."""
    seen = []
    for server, client, address in ((net.host, net.peer, HOST), (net.peer, net.host, PEER)):
        where = (address[socket.AF_INET], 8080)
        with serving(net, server, where, relay_net.say_who("it")) as served, net.connect(client, where) as made:
            assert json.loads(relay_net.read_all(made))[0] == "it"
            seen.append(served.peers[0][1] == made.getsockname()[1])
    return seen


def test_a_killed_envoy_is_passed_by_at_once_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    with network(dataclasses.replace(POLICY, when_proxy_down=WhenProxyDown.BYPASS)) as net:
        for attempt in range(2):
            with contextlib.suppress(ProcessLookupError), running_envoy(net, tmp_path / f"{attempt}.log"):
                assert _directly(net) == [False, False]
                _kill_envoys(net)
                time.sleep(AWAY_SECONDS)
                assert _directly(net) == [True, True]


def test_without_bypass_a_killed_envoy_means_refused(tmp_path: Path) -> None:
    with network() as net, running_envoy(net, tmp_path / "envoy.log"):
        assert _directly(net) == [False, False]
        _kill_envoys(net)
        time.sleep(AWAY_SECONDS)
        for client, address in ((net.peer, HOST), (net.host, PEER)):
            with pytest.raises(ConnectionRefusedError):
                net.connect(client, (address[socket.AF_INET], 8080))
