"""Nobody reaches through the relay what he could not reach himself: loopback services, metadata, links, the relay."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, HOST6, PEER, PEER4, PEER6, Net
from tests.netns.relay.test_listeners import configured, serving
from tpctl.relay.connections.proxy_protocol import Header, build
from tpctl.relay.loop.original_destination import Destination

pytestmark = pytest.mark.root
V4, V6 = socket.AF_INET, socket.AF_INET6
SECRET = 5432
LINK_LOCAL = "169.254.7.7"
METADATA = ("169.254.169.254", "fd00:ec2::254")
DIRECT = """
listeners:
  - {listen: "[::]:15006 ipv6only=off", direction: inbound}
  - {listen: "[::]:15001 ipv6only=off", direction: outbound}
"""
BEHIND_A_PROXY = """
trusted_ips: ["0.0.0.0/0", "::/0"]
dns: {{zone_file: {zone}}}
listeners:
  - {{listen: "[::]:15006 ipv6only=off proxy_protocol", direction: inbound, source: kernel}}
  - {{listen: "[::]:15001 ipv6only=off proxy_protocol", direction: outbound}}
"""
UNREACHABLE = ("127.0.0.1", "127.0.0.6", "0.0.0.0", "::1", "::", "240.0.0.1", LINK_LOCAL, *METADATA,
               "64:ff9b::a9fe:a9fe")  # fmt: skip
"""By a proxy on another host: loopback, a virtual address that leads there, a link, and metadata services."""
ZONE = f"""
names:
  db.mesh:
    addresses: [240.0.0.1]
    upstreams: ["127.0.0.1:{SECRET}"]
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """The host has a link-local address, and routes to metadata services, all of which the peer plays."""
    with relay_net.network(redirect=False) as network:
        for address in (f"{LINK_LOCAL}/16", f"{METADATA[0]}/32", f"{METADATA[1]}/128"):
            network.add_address(network.peer, address)
        network.add_address(network.host, "169.254.7.8/16")
        relay_net.run("ip", "-n", network.host, "-6", "route", "add", METADATA[1], "dev", "eth0")
        yield network


@pytest.fixture
def secrets(net: Net) -> Iterator[list[relay_net.Server]]:
    """What must not be reached; each knows who has reached it."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(serving(net, where, (address, SECRET), relay_net.say_who("secret")))
            for where, address in [
                (net.host, "127.0.0.1"),
                (net.host, "127.0.0.6"),
                (net.host, "::1"),
                (net.peer, LINK_LOCAL),
                (net.peer, METADATA[0]),
                (net.peer, METADATA[1]),
            ]
        ]
        yield found


def reached(secrets: list[relay_net.Server]) -> list[object]:
    return [peer for server in secrets for peer in server.peers]


def said(net: Net, name: str, address: tuple[str, int], header: bytes = b"") -> bytes:
    """What a connection brings; nothing when it is reset."""
    try:
        with net.connect(name, address) as client:
            client.sendall(header)
            return relay_net.read_all(client)
    except (ConnectionResetError, BrokenPipeError):
        return b""


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize("port", [15001, 15006])
def test_a_listener_is_no_way_in(
    net: Net, directory: Path, secrets: list[relay_net.Server], family: socket.AddressFamily, port: int
) -> None:
    """Nobody has redirected these connections: they have no other destination than the relay."""
    asks = b"CONNECT 127.0.0.1:5432 HTTP/1.1\r\n\r\n"
    forged = build(Header(1, source=Destination(HOST[family], 9, family), destination=Destination("127.0.0.1", SECRET)))
    with configured(net, directory, DIRECT) as running:
        for words in (b"", asks, forged):
            assert said(net, net.peer, (HOST[family], port), words) == b""
            assert said(net, net.host, (HOST[family], port), words) == b""
        running.wait_for("refused: a connection to the relay's own port")
    assert reached(secrets) == []


def behind_a_proxy(directory: Path) -> str:
    """The configuration of a relay whose proxies are believed, wherever they are."""
    zone = directory / "zone.yaml"
    zone.write_text(ZONE)
    return BEHIND_A_PROXY.format(zone=zone)


def endpoint(host: str, port: int = SECRET) -> Destination:
    return Destination(host, port, V6 if ":" in host else V4)


def header(source: str, destination: str) -> bytes:
    """Of version 2, which can have IPv4 in the form of IPv6."""
    ends = [socket.inet_pton(V6, host if ":" in host else f"::ffff:{host}") for host in (source, destination)]
    ports = (40000).to_bytes(2, "big") + SECRET.to_bytes(2, "big")
    return build(Header(2))[:12] + b"\x21\x21" + (36).to_bytes(2, "big") + b"".join(ends) + ports


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize("port", [15001, 15006])
def test_a_proxy_elsewhere_cannot_name_what_only_this_host_reaches(
    net: Net, directory: Path, secrets: list[relay_net.Server], family: socket.AddressFamily, port: int
) -> None:
    """Even one that is trusted: it may pass on what an attacker has written, for instance a second header."""
    public = serving(net, net.peer, (PEER[family], SECRET), relay_net.say_who("public"))
    with configured(net, directory, behind_a_proxy(directory)), public:
        for destination in UNREACHABLE:
            for claimed in ("203.0.113.9", "127.0.0.1", "::1", HOST4, HOST6):
                words = header(claimed, destination)
                assert said(net, net.peer, (HOST[family], port), words) == b"", (destination, claimed)
            plain = build(Header(1, source=endpoint("127.0.0.1", 9), destination=endpoint(destination)))
            assert said(net, net.peer, (HOST[family], port), plain) == b"", destination
        assert b"public" in said(net, net.peer, (HOST[family], port), header("203.0.113.9", PEER[family]))
    assert reached(secrets) == []


def test_a_proxy_on_this_host_reaches_what_it_reaches_anyway(net: Net, directory: Path) -> None:
    with (
        configured(net, directory, behind_a_proxy(directory)),
        serving(net, net.host, ("127.0.0.1", SECRET), relay_net.say_who("database")),
        serving(net, net.peer, (LINK_LOCAL, SECRET), relay_net.say_who("neighbour")),
    ):
        for destination, name in (("127.0.0.1", "database"), ("240.0.0.1", "database"), (LINK_LOCAL, "neighbour")):
            answer = said(net, net.host, ("127.0.0.1", 15001), header("127.0.0.1", destination))
            assert json.loads(answer)[0] == name
            # Not on behalf of a client elsewhere.
            assert said(net, net.host, ("127.0.0.1", 15001), header("203.0.113.9", destination)) == b""
        assert said(net, net.host, ("127.0.0.1", 15001), header("127.0.0.1", METADATA[0])) == b""


LEADING_BACK = ("127.0.0.1", "127.0.0.6", "127.9.9.9", "0.0.0.0", HOST4, "::ffff:127.0.0.1", f"::ffff:{HOST4}", "::1",
                "::6", "::", HOST6)  # fmt: skip
"""Every way to write that the relay itself is meant."""


def connections(net: Net) -> int:
    return len(net.on_host("ss", "-Htn", "state", "established", "sport = :15001 or sport = :15006").splitlines())


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_relay_is_not_led_to_itself(directory: Path, workers: str) -> None:
    """By an application, by a peer, and by a header; with a redirection, so that its own dials could come back."""
    with relay_net.network() as network:
        options = ["--workers", workers, "--metrics", "127.0.0.1:9902", "--trusted-ips", "0.0.0.0/0,::/0"]
        options += ["--inbound-listen", "[::]:15006 ipv6only=off proxy_protocol"]
        with relay_net.relay(network, directory, *options, "--access-log") as running:
            for host in LEADING_BACK:
                assert said(network, network.host, (host, 15001)) == b""
                for port in (15001, 15006, 15053, 9902):
                    named = header("127.0.0.1", host)[:-2] + port.to_bytes(2, "big")
                    for name, via in ((network.peer, HOST4), (network.peer, HOST6), (network.host, "127.0.0.1")):
                        assert said(network, name, (via, 15006), named) == b""
            relay_net.until(lambda: connections(network) == 0)
            dialled = [line for line in running.lines() if line["event"] == "connection" and line["upstream"]]
            # Nobody listens there: the metrics have one address.
            assert {line["destination"].rpartition(":")[2] for line in dialled} == {"9902"}
            assert {line["reason"] for line in dialled} == {"the upstream was not reached"}


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("destination", [(PEER4, 4444), (PEER6, 4444)])
def test_a_loop_through_a_wrong_user_ends(directory: Path, workers: int, destination: tuple[str, int]) -> None:
    """Run as root, whose connections the rules redirect: each dial comes back, and a flood of them would not end."""
    with (
        relay_net.network() as network,
        relay_net.relay(network, directory, "--workers", str(workers), "--access-log", user=None) as running,
    ):
        for _ in range(5):
            assert said(network, network.host, destination) == b""
        relay_net.until(lambda: connections(network) == 0)
        running.wait_for("refused: the relay's own connections come back")
        dials = [line for line in running.lines() if line["event"] == "connection"]
        assert len(dials) < 5 * 100, "a connection of an application became hundreds"


def test_fixed_upstreams_in_a_circle_end(net: Net, directory: Path) -> None:
    text = """
workers: {workers}
listeners:
  - {{listen: "*:1101", direction: outbound, upstream: "127.0.0.1:1102"}}
  - {{listen: "*:1102", direction: outbound, upstream: "127.0.0.1:1103"}}
  - {{listen: "*:1103", direction: outbound, upstream: "127.0.0.1:1101"}}
"""
    for workers in (1, 2):
        with configured(net, directory, text.format(workers=workers)):
            assert said(net, net.peer, (HOST4, 1101)) == b""
            ports = "sport >= :1101 and sport <= :1103"
            relay_net.until(lambda: not net.on_host("ss", "-Htn", "state", "established", ports))  # noqa: B023
