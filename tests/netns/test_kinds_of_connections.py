"""Connections of another kind than plain TCP: MPTCP, TCP Fast Open, and source ports that only root may have."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net
from tests.netns.test_application_sockets import ENGINES, Command, host_of

pytestmark = pytest.mark.root

FAMILIES = (socket.AF_INET, socket.AF_INET6)
PORT = 8080
LOW = 701
MPTCP = 262
"""IPPROTO_MPTCP (linux/in.h)."""
MSG_FASTOPEN = 0x20000000
"""linux/socket.h: the data goes with the SYN."""
FAST_OPEN = 0x603
"""ip-sysctl: client and server, a cookie is never needed, and every listener takes part, the data plane's too."""


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        for name in (network.host, network.peer):
            relay_net.run("nsenter", f"--net=/run/netns/{name}", "sysctl", "-qw", f"net.ipv4.tcp_fastopen={FAST_OPEN}")
        yield network


@contextlib.contextmanager
def installed(net: Net, tpctl: Command, engine: str, *flags: str) -> Iterator[None]:
    with net.inside(net.host):
        tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], *flags)
    try:
        yield
    finally:
        with net.inside(net.host):
            tpctl("uninstall")


@contextlib.contextmanager
def serving(net: Net) -> Iterator[None]:
    """A server on the peer, and one on our host, for each family."""
    places = [(net.peer, PEER[family]) for family in FAMILIES] + [(net.host, HOST[family]) for family in FAMILIES]
    servers = [relay_net.Server(net.listen(name, (to, PORT)), tell(name)) for name, to in places]
    try:
        yield
    finally:
        for server in servers:
            server.close()


def tell(name: str) -> relay_net.Service:
    """A service that tells its name and who asks, when it has read everything: unread data would end in a reset."""

    def serve(client: socket.socket, peer: Any) -> None:
        relay_net.read_all(client)
        relay_net.say_who(name)(client, peer)

    return serve


def client_in(net: Net, name: str, family: socket.AddressFamily, protocol: int = 0) -> socket.socket:
    with net.inside(name):
        made = socket.socket(family, socket.SOCK_STREAM, protocol)
    made.settimeout(relay_net.TIMEOUT)
    return made


def answer(client: socket.socket) -> str:
    """Who answered, and from where it was asked."""
    client.shutdown(socket.SHUT_WR)
    name, asked_from, *_ = json.loads(relay_net.read_all(client))
    return f"{name} asked from {asked_from}"


def syn_data(net: Net) -> int:
    """How many connections our host has accepted with the data of their SYN (proc_pid_net(5), netstat)."""
    lines = net.on_host("cat", "/proc/net/netstat").splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))["TCPFastOpenPassive"])


def require_mptcp(net: Net) -> None:
    try:
        client_in(net, net.host, socket.AF_INET, MPTCP).close()
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error}")


@pytest.mark.parametrize("engine", ENGINES)
def test_mptcp_and_fast_open_go_through_the_data_plane(
    engine: str, net: Net, tmp_path_factory: pytest.TempPathFactory, directory: Path
) -> None:
    require_mptcp(net)
    with (
        host_of(engine, tmp_path_factory) as tpctl,
        relay_net.relay(net, directory, "--access-log") as running,
        installed(net, tpctl, engine),
        serving(net),
    ):
        for family in FAMILIES:
            passthrough = "127.0.0.6" if family == socket.AF_INET else "::6"
            for name, to, expected in (
                (net.host, PEER[family], f"{net.peer} asked from {HOST[family]}"),
                (net.peer, HOST[family], f"{net.host} asked from {passthrough}"),
            ):
                before = syn_data(net)
                with client_in(net, name, family) as client:
                    client.settimeout(None)  # a time limit makes it non-blocking, and the data stays behind
                    client.sendto(b"hello", MSG_FASTOPEN, (to, PORT))
                    client.settimeout(relay_net.TIMEOUT)
                    assert answer(client) == expected
                assert syn_data(net) > before
                with client_in(net, name, family, MPTCP) as client:
                    client.connect((to, PORT))
                    assert answer(client) == expected
        relay_net.until(lambda: sum(line["event"] == "connection" for line in running.lines()) == 8)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_trusts_low_source_ports_is_reached_directly_where_it_is_excluded(
    engine: str, net: Net, tmp_path_factory: pytest.TempPathFactory, directory: Path
) -> None:
    listener = net.listen(net.peer, (PEER[socket.AF_INET], PORT))
    server = relay_net.Server(listener, tell("server"))
    with host_of(engine, tmp_path_factory) as tpctl, relay_net.relay(net, directory):
        flags = ("--exclude-outbound-ports", str(PORT))
        with installed(net, tpctl, engine, *flags), client_in(net, net.host, socket.AF_INET) as client:
            client.bind(("", LOW))
            client.connect((PEER[socket.AF_INET], PORT))
            assert answer(client) == f"server asked from {HOST[socket.AF_INET]}"
    assert server.peers[-1][1] == LOW
    server.close()
