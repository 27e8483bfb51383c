"""Connections of another host to a link-local address of ours reach the application there, whoever redirects them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.engines import test_ebpf_data_planes as ebpf
from tests.netns.engines.test_tproxy import ENGINES
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER6, Net, Server

pytestmark = pytest.mark.root
PORT, OTHER_PORT = 8080, 8081
WAYS = [(engine, mode) for engine in ENGINES for mode in ("redirect", "tproxy")]


def link_local(net: Net, name: str) -> str:
    """The address that the kernel has given eth0."""
    shown = relay_net.run("ip", "-n", name, "-6", "addr", "show", "dev", "eth0", "scope", "link")
    found = re.search(r"inet6 (fe80::[^/]+)/", shown)
    assert found is not None, shown
    return found[1]


def scoped(net: Net, name: str, host: str, port: int) -> tuple[str, int, int, int]:
    with net.inside(name):
        return (host, port, 0, socket.if_nametoindex("eth0"))


@contextlib.contextmanager
def application(net: Net, host: str) -> Iterator[None]:
    """One that listens everywhere, and one that listens at the link-local address alone."""
    everywhere = net.listen(net.host, ("::", PORT))
    with net.inside(net.host):
        there = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    there.bind(scoped(net, net.host, host, OTHER_PORT))
    there.listen()
    servers = [Server(listener, relay_net.say_who("application")) for listener in (everywhere, there)]
    try:
        yield
    finally:
        for server in servers:
            server.close()


def answer(net: Net, host: str, port: int, source: str | None = None) -> list[object]:
    """What a client on the link gets, from its link-local address or another one."""
    address = scoped(net, net.peer, host, port)
    with net.inside(net.peer), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as client:
        client.settimeout(relay_net.TIMEOUT)
        if source is not None:
            client.bind((source, 0))
        client.connect(address)
        found: list[object] = json.loads(relay_net.read_all(client))
    return found


def check(net: Net, running: relay_net.Relay, host: str) -> None:
    """With access log: what arrives has gone through the relay."""
    with application(net, host):
        for port in (PORT, OTHER_PORT):
            for source in (None, PEER6):
                assert answer(net, host, port, source) == ["application", host, host, port]
                client = source or link_local(net, net.peer)
                line = running.wait_for("connection", client=client, destination=f"[{host}]:{port}")
                assert (line["listener"], line["reason"]) == ("inbound", "closed")


@pytest.mark.parametrize(("engine", "mode"), WAYS)
def test_with_rules_of_netfilter(tmp_path: Path, engine: str, mode: str) -> None:
    with relay_net.network(redirect=False) as net:
        with net.inside(net.host):
            lab.tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], "--inbound-mode", mode)
        options = ("--transparent",) if mode == "tproxy" else ()
        with relay_net.relay(net, tmp_path, "--access-log", *options) as running:
            check(net, running, link_local(net, net.host))
        with net.inside(net.host):
            lab.tpctl("uninstall")


def test_with_ebpf(tmp_path: Path) -> None:
    with ebpf.network() as net, relay_net.relay(net, tmp_path, "--access-log") as running:
        check(net, running, link_local(net, net.host))
