"""A DNS listener is for this host and its networks: not for strangers, nor for victims in whose name they ask."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay import syn_flood
from tests.netns.relay.dns_net import (
    QUESTION,
    answer_to,
    drained,
    framed,
    name_server,
    query,
    read_framed,
    readable,
    relay_for,
)
from tests.netns.relay.net import HOST, HOST4, PEER4, PEER6, Net
from tests.netns.relay.test_listeners import configured
from tpctl.relay.connections import routes

pytestmark = pytest.mark.root
FAR = {socket.AF_INET: "198.18.0.9", socket.AF_INET6: "2001:db8:5::9"}
"""Addresses of the peer behind a router, as the host sees it."""
LOCAL = b"\x02db\x04mesh\x00\x00\x01\x00\x01"


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as network:
        syn_flood.prepare(network)
        for address in (f"{FAR[socket.AF_INET]}/32", f"{FAR[socket.AF_INET6]}/128"):
            network.add_address(network.peer, address)
        yield network


@pytest.fixture
def zone(tmp_path: Path) -> Iterator[Path]:
    path = readable(tmp_path, "hosts", "240.0.0.1 db.mesh\n")
    try:
        yield path
    finally:
        path.unlink()


def asked(net: Net, source: str | None, family: socket.AddressFamily, question: bytes = QUESTION) -> bool:
    """Whether there is an answer over UDP."""
    return is_answered(net, source, family, question, relay_net.TIMEOUT if source is None else 0.7)


def is_answered(
    net: Net, source: str | None, family: socket.AddressFamily, question: bytes, patience: float = relay_net.TIMEOUT
) -> bool:
    with net.datagram(net.peer, family, (source, 0) if source else None) as client:
        client.settimeout(patience)
        client.connect((HOST[family], 15053))
        client.send(query(7, question))
        try:
            return client.recv(4096)[:2] == b"\0\7"
        except TimeoutError:
            return False


def asked_over_tcp(net: Net, source: str | None, family: socket.AddressFamily) -> bool:
    try:
        with net.connect(net.peer, (HOST[family], 15053), source) as client:
            client.sendall(framed(query(7, LOCAL)))
            return read_framed(client)[:2] == b"\0\7"
    except OSError:
        return False


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_strangers_are_not_answered(net: Net, tmp_path: Path, zone: Path, family: socket.AddressFamily) -> None:
    options = ("--dns-zone-file", str(zone))
    with (
        name_server(net, PEER4, lambda message: [answer_to(message, 1)]) as server,
        relay_for(net, tmp_path, PEER4, options=options) as (_, running),
    ):
        assert asked(net, None, family)
        assert asked(net, None, family, LOCAL)
        assert asked_over_tcp(net, None, family)
        before = len(server.seen)
        for question in (QUESTION, LOCAL):
            assert not asked(net, FAR[family], family, question)
        assert not asked_over_tcp(net, FAR[family], family)
        assert len(server.seen) == before, "it was looked up"
        running.wait_for("refused: a DNS query from a network this host is not attached to", client=FAR[family])


def test_access_rules_open_it(net: Net, tmp_path: Path, zone: Path) -> None:
    text = f"""
dns: {{zone_file: {zone}}}
listeners: [{{listen: "[::]:15053 ipv6only=off", direction: dns, access: {{allow: [198.18.0.0/15]}}}}]
"""
    with configured(net, tmp_path, text):
        assert is_answered(net, FAR[socket.AF_INET], socket.AF_INET, LOCAL)
        assert not asked(net, FAR[socket.AF_INET6], socket.AF_INET6, LOCAL)


def spoofed(net: Net, count: int) -> None:
    """Queries that say they come from many victims elsewhere."""
    with net.inside(net.peer):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    question = query(7, LOCAL)
    length = (8 + len(question)).to_bytes(2, "big")
    with raw:
        for number in range(count):
            source = bytes((198, 19)) + (number & 0xFFFF).to_bytes(2, "big")
            datagram = (5353).to_bytes(2, "big") + (15053).to_bytes(2, "big") + length + b"\0\0" + question
            header = b"\x45\0\0\0\0\1\0\0\x40\x11\0\0" + source + socket.inet_aton(HOST4)
            raw.sendto(header + datagram, (HOST4, 0))


def sent(net: Net) -> int:
    """Datagrams that our host has sent so far."""
    lines = net.on_host("cat", "/proc/net/snmp").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Udp:"))
    return int(values[names.index("OutDatagrams")])


def test_nobody_is_flooded_in_whose_name_is_asked(net: Net, tmp_path: Path, zone: Path) -> None:
    with relay_for(net, tmp_path, PEER6, options=("--dns-zone-file", str(zone))) as (_, running):
        assert asked(net, None, socket.AF_INET, LOCAL)
        before = sent(net)
        spoofed(net, 5000)
        running.wait_for("refused: a DNS query from a network this host is not attached to")
        relay_net.until(lambda: drained(net, net.host, 15053))
        assert asked(net, None, socket.AF_INET, LOCAL)
        assert sent(net) - before < 10


def test_the_kernel_knows_who_is_near(net: Net) -> None:
    with net.inside(net.host):
        near = {host: routes.is_near(host) for host in (PEER4, PEER6, HOST4, "::1", *FAR.values(), "203.0.113.9")}
    assert near == {PEER4: True, PEER6: True, HOST4: True, "::1": True, **dict.fromkeys(FAR.values(), False),
                    "203.0.113.9": False}  # fmt: skip
