"""Nobody reaches the data plane's own ports except by redirection (g1), through every engine, with a real Envoy behind.

A connection that was opened to one of them makes an Envoy of the usual configuration dial itself until it is dead.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.engines import test_ebpf_data_planes as ebpf
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, RELAY_UID, RELAY_USER, Net
from tests.netns.test_envoy import PASSTHROUGH, WILDCARD, running_envoy, serving
from tpctl.rehearsal.cgroup import own_place
from tpctl.spec.policy import Policy

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
    "tproxy": ("--engine", "nftables", "--inbound-mode", "tproxy"),
}
PORTS = (15001, 15006, 15053)
LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
ATTEMPTS = 10_000
FEW = 100
"""Sockets that an idle Envoy and this test have, with room; one that dials itself has thousands in no time."""


@contextlib.contextmanager
def network(engine: str, *flags: str) -> Iterator[Net]:
    """Our host and a peer, with an installation."""
    if engine == "ebpf":
        with ebpf.network(Policy(RELAY_UID, guard_ports="--no-guard-ports" not in flags)) as made:
            yield made
        return
    with relay_net.network(redirect=False, passthrough6=False) as made:
        install(made, engine, *flags)
        yield made
        with made.inside(made.host):
            lab.tpctl("uninstall")


def install(net: Net, engine: str, *flags: str) -> None:
    with net.inside(net.host):
        lab.tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES[engine], *flags)


Target = tuple[str, int] | tuple[str, int, int, int]


def outcome(net: Net, name: str, address: Target, kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """The error of a connection, or of a datagram and what comes back; 0 when there is none."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with net.inside(name):
        client = socket.socket(family, kind)
    with client:
        client.settimeout(relay_net.TIMEOUT)
        try:
            client.connect(address)
            if kind is socket.SOCK_DGRAM:
                with contextlib.suppress(PermissionError):  # a rule took it on its way out; the refusal comes by ICMP
                    client.send(b"query")
                client.recv(100)
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno or -1
        return 0


@pytest.mark.parametrize("engine", [*ENGINES, "ebpf"])
def test_an_envoy_survives_ten_thousand_connections_to_its_own_ports(tmp_path: Path, engine: str) -> None:
    with network(engine) as net, running_envoy(net, tmp_path / "envoy.log", guarded=False):
        ways = [
            (name, (address[family], port))
            for family in HOST
            for port in PORTS[:2]
            for name, address in ((net.peer, HOST), (net.host, HOST), (net.host, LOCAL))
        ]
        for name, address in itertools.islice(itertools.cycle(ways), ATTEMPTS):
            assert outcome(net, name, address) == errno.ECONNREFUSED, (name, address)
        assert net.on_host("ss", "-Htan").count("\n") < FEW
        if engine == "tproxy":
            return  # this Envoy's listener is not transparent
        for family in HOST:
            with (
                serving(net, net.host, (HOST[family], 8080), relay_net.say_who("application")),
                net.connect(net.peer, (HOST[family], 8080)) as client,
            ):
                told = json.loads(relay_net.read_all(client))
            assert told == ["application", PASSTHROUGH[family], HOST[family], 8080]
            # The same port of another host is like any.
            with (
                serving(net, net.peer, (PEER[family], 15001), relay_net.say_who("server")),
                net.connect(net.host, (PEER[family], 15001)) as client,
            ):
                assert json.loads(relay_net.read_all(client)) == ["server", HOST[family], PEER[family], 15001]


@contextlib.contextmanager
def listening(net: Net) -> Iterator[dict[socket.AddressFamily, socket.socket]]:
    """Listeners on each of the data plane's ports; hands back those of the outbound port, by family."""
    with contextlib.ExitStack() as stack:
        made = {
            (family, port): stack.enter_context(net.listen(net.host, (address, port)))
            for family, address in WILDCARD.items()
            for port in PORTS
        }
        yield {family: made[family, 15001] for family in WILDCARD}


@pytest.mark.parametrize("engine", [*ENGINES, "ebpf"])
def test_every_port_from_outside_and_inside(engine: str) -> None:
    with network(engine) as net, listening(net), net.datagram(net.host, socket.AF_INET, ("", 15053)) as queries:
        for family in HOST:
            for name, address in ((net.peer, HOST[family]), (net.host, HOST[family]), (net.host, LOCAL[family])):
                for port in PORTS:
                    assert outcome(net, name, (address, port)) == errno.ECONNREFUSED, (name, address, port)
                assert outcome(net, name, (address, 15053), socket.SOCK_DGRAM) == errno.ECONNREFUSED, (name, address)
        queries.setblocking(False)
        with pytest.raises(BlockingIOError):
            queries.recv(100)


def link_local(net: Net, name: str, link: str) -> str:
    """The address, once it is there."""
    argv = ("ip", "-n", name, "-oneline", "-6", "addr", "show", "dev", link, "scope", "link")
    relay_net.until(lambda: "fe80::" in relay_net.run(*argv))
    return relay_net.run(*argv).split()[3].partition("/")[0]


def scope(net: Net, name: str, link: str) -> int:
    with net.inside(name):
        return socket.if_nametoindex(link)


@pytest.mark.parametrize("engine", [*ENGINES, "ebpf"])
def test_link_local_clients_of_every_link(engine: str) -> None:
    """A reset is routed without the interface (nf_send_reset6()), and would leave by one of the links."""
    with network(engine) as net:
        links = ["eth0", "eth1", "eth2"]
        for link in links[1:]:
            relay_net.run(
                "ip", "-n", net.host, "link", "add", link, "type", "veth", "peer", "name", link, "netns", net.peer
            )
            for name in (net.host, net.peer):
                relay_net.run("ip", "-n", name, "link", "set", link, "up")
        for link in links:
            to = link_local(net, net.host, link)
            link_local(net, net.peer, link)
            for name in (net.peer, net.host):
                for port in (*PORTS, 8080):  # where nobody listens, a redirected connection is refused as well
                    there = (to, port, 0, scope(net, name, link))
                    assert outcome(net, name, there) == errno.ECONNREFUSED, (name, link, port)


@pytest.mark.needs("ebpf")
def test_prefixes_that_are_local_as_a_whole() -> None:
    """AnyIP, by eBPF, whose programs find single addresses by themselves: the other engines ask the kernel."""
    prefixes = {"10.9.3.4": "10.9.0.0/16", "fd99:9::7": "fd99:9::/64"}
    with own_place() as place, relay_net.network(redirect=False, passthrough6=False) as net:
        flags = ("--engine", "ebpf", "--ebpf-cgroup-path", str(place.cgroup), "--ebpf-bpffs-path", str(place.pins))
        with net.inside(net.host):
            lab.tpctl("install", "--kuma-dp-user", RELAY_USER, *flags)
            for prefix in prefixes.values():
                lab.run(["ip", "route", "add", "local", prefix, "dev", "lo"])
            assert lab.tpctl("status", check=False).returncode == 3  # the programs do not know of them
            lab.tpctl("apply")
            assert json.loads(lab.tpctl("status", "--json", check=False).stdout)["drift"] == []
        with listening(net):
            for address in prefixes:
                for port in PORTS:
                    assert outcome(net, net.host, (address, port)) == errno.ECONNREFUSED, (address, port)
                with serving(
                    net, net.host, ("::" if ":" in address else "0.0.0.0", 8080), relay_net.say_who("application")
                ):
                    with net.connect(net.host, (address, 8080)) as client:
                        told = json.loads(relay_net.read_all(client))
                    assert told[0] == "application"
                    assert told[2:] == [address, 8080]
        with net.inside(net.host):
            lab.tpctl("uninstall")


@pytest.mark.parametrize("engine", [*ENGINES, "ebpf"])
def test_without_the_guard_they_are_reached(engine: str) -> None:
    """And a flow of queries that runs when the guard comes goes on, as conntrack knows it."""
    with (
        network(engine, "--no-guard-ports") as net,
        listening(net),
        net.datagram(net.host, socket.AF_INET, ("127.0.0.1", 15053)) as server,
        net.datagram(net.host, socket.AF_INET) as client,
    ):
        for family in HOST:
            assert [outcome(net, net.host, (LOCAL[family], port)) for port in PORTS] == [0, 0, 0]
        client.connect(("127.0.0.1", 15053))
        for _ in range(1 if engine == "ebpf" else 2):
            client.send(b"query")
            query, asker = server.recvfrom(100)
            server.sendto(b"answer", asker)
            assert (query, client.recv(100)) == (b"query", b"answer")
            if engine != "ebpf":
                install(net, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_connections_that_run_when_it_comes_go_on(engine: str) -> None:
    with relay_net.network(redirect=False, passthrough6=False) as net, listening(net) as listeners:
        clients = {family: net.connect(net.host, (LOCAL[family], 15001)) for family in HOST}
        install(net, engine)
        for family, client in clients.items():
            with client, listeners[family].accept()[0] as served:
                for near, far in ((client, served), (served, client)):
                    near.sendall(b"still there")
                    far.settimeout(relay_net.TIMEOUT)
                    assert far.recv(100) == b"still there"
            assert outcome(net, net.host, (LOCAL[family], 15001)) == errno.ECONNREFUSED
        with net.inside(net.host):
            lab.tpctl("uninstall")
        assert [outcome(net, net.host, (LOCAL[family], 15001)) for family in HOST] == [0, 0]
