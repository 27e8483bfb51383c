"""Whatever is sent to the DNS listener, the relay goes on, answers, and gives back what it took."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import dns.message
import dns.name
import dns.rcode
import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import answer_to, ask, dig, drained, framed, name_server, query, readable, relay_for
from tests.netns.relay.net import HOST4, PEER4, Net, Relay
from tpctl.relay.dns.waiting import MAX_PENDING

pytestmark = pytest.mark.root

DATAGRAMS = 20_000
CONNECTIONS = 400
SEED = 20_26
RELAY = (HOST4, 15053)
MAX_GROWTH_KB = 16 * 1024
"""The answers that are kept, the allocator's slack. A megabyte of queries that are not forgotten would show."""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as network:
        yield network


@pytest.fixture
def relay(net: Net, tmp_path: Path) -> Iterator[Relay]:
    path = readable(tmp_path, "hosts", "240.0.0.1 db.mesh\n")
    try:
        with (
            name_server(net, PEER4, lambda message: [answer_to(message, 1)]),
            relay_for(net, tmp_path, PEER4, resolv_options="", options=("--dns-zone-file", str(path))) as (_, running),
        ):
            yield running
    finally:
        path.unlink()


def seeds() -> list[bytes]:
    made = [dns.message.make_query(name, "A", **edns).to_wire()  # type: ignore[arg-type]
            for name in ("db.mesh", "none.mesh", "example.com")
            for edns in ({}, {"use_edns": 0, "payload": 4096, "want_dnssec": True})]  # fmt: skip
    loop = b"\xc0\x0c"
    return [
        *made,
        query(1, loop + b"\0\1\0\1"),
        query(1, b"\x02db\x04mesh\0\0\1\0\1")[:11]
        + b"\x01"
        + b"\x02db\x04mesh\0\0\1\0\1"
        + b"\xc0\x19\0\1\0\1"
        + bytes(6),
        answer_to(query(1), 1),
        query(1, b"\x3f" * 300),
    ]


def mutated(draw: random.Random, message: bytes) -> bytes:
    changed = bytearray(message)
    for _ in range(draw.randint(0, 5)):
        where = draw.randrange(len(changed) + 1)
        match draw.randrange(4):
            case 0:
                changed[where : where + 1] = bytes((draw.choice((0, 0xC0, 0xFF, draw.randrange(256))),))
            case 1:
                del changed[where : where + draw.randint(1, 9)]
            case 2:
                changed[where:where] = draw.randbytes(draw.randint(1, 9))
            case _:
                changed += draw.randbytes(draw.randint(0, 600))
    return bytes(changed)


def memory_kb(relay: Relay) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{relay.process.pid}/status").read_text())
    assert found
    return int(found[1])


def descriptors(relay: Relay) -> int:
    return len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))


def is_well(net: Net, relay: Relay) -> None:
    """The relay answers, its own and others' names, over both transports, once it has read all that was sent to it."""
    assert relay.process.poll() is None
    relay_net.until(lambda: drained(net, net.host, RELAY[1]) and drained(net, net.peer, 53))
    with net.datagram(net.host, socket.AF_INET) as client:
        client.connect(RELAY)
        client.send(query(0x1234))
        assert client.recv(4096) == answer_to(query(0x1234), 1)
    for transport in ("+tcp", "+notcp"):
        said = dig(net, transport, "+short", "-p", str(RELAY[1]), "db.mesh", server=RELAY[0])
        assert said.split() == ["240.0.0.1"]


def settled(relay: Relay, before: int) -> None:
    """All descriptors are given back within the time a silent server is waited for."""
    relay_net.until(lambda: descriptors(relay) <= before)


def blast(net: Net, relay: Relay, draw: random.Random, count: int) -> None:
    messages = seeds()
    with net.datagram(net.host, socket.AF_INET) as client:
        client.connect(RELAY)
        client.setblocking(False)
        for number in range(count):
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                client.send(mutated(draw, draw.choice(messages)))
            if number % 50 == 0:
                time.sleep(0.002)  # the relay should get to see most of them
                with contextlib.suppress(BlockingIOError):
                    while True:
                        client.recv(65535)


def test_any_datagrams(net: Net, relay: Relay) -> None:
    draw = random.Random(SEED)
    is_well(net, relay)
    before = descriptors(relay)
    blast(net, relay, draw, DATAGRAMS // 4)
    warm = memory_kb(relay)
    blast(net, relay, draw, DATAGRAMS)
    settled(relay, before)
    is_well(net, relay)
    assert memory_kb(relay) - warm < MAX_GROWTH_KB


def test_one_id_for_all_queries(net: Net, relay: Relay) -> None:
    """A client that has many questions at once, from one port and under one id, takes no places for good."""
    names = [f"name{number}.example" for number in range(MAX_PENDING + 200)]
    at_once = 20
    with net.datagram(net.host, socket.AF_INET) as client:
        client.connect(RELAY)
        for first in range(0, len(names), at_once):
            asked = {dns.name.from_text(name) for name in names[first : first + at_once]}
            for name in asked:
                client.send(dns.message.make_query(name, "A", id=7).to_wire())
            answers = [dns.message.from_wire(client.recv(4096)) for _ in asked]
            assert {answer.question[0].name for answer in answers} == asked
            assert all(answer.rcode() == dns.rcode.NOERROR for answer in answers)
    is_well(net, relay)
    assert not [line for line in relay.lines() if line["level"] != "info"]


def abuse(net: Net, draw: random.Random, number: int) -> None:
    """One client over TCP: garbage, frames of any kind, half of a frame, answers that are never read, a reset."""
    messages = seeds()
    with net.connect(net.host, RELAY) as client:
        client.settimeout(0.05)
        with contextlib.suppress(OSError):
            match number % 4:
                case 0:
                    client.sendall(draw.randbytes(draw.randint(1, 5000)))
                case 1:
                    for _ in range(20):
                        client.sendall(framed(mutated(draw, draw.choice(messages))))
                    client.recv(65535)
                case 2:
                    client.sendall(b"\x0f\xff" + b"x" * draw.randint(0, 4000))
                case _:
                    client.sendall(framed(messages[0]) * 2000)
        if number % 3:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_any_streams(net: Net, relay: Relay) -> None:
    draw = random.Random(SEED)
    is_well(net, relay)
    before = descriptors(relay)
    for number in range(CONNECTIONS // 4):
        abuse(net, draw, number)
    warm = memory_kb(relay)
    for number in range(CONNECTIONS):
        abuse(net, draw, number)
    settled(relay, before)
    is_well(net, relay)
    assert memory_kb(relay) - warm < MAX_GROWTH_KB


def test_a_client_that_does_not_read_fills_no_memory(net: Net, relay: Relay) -> None:
    """It asks for as long as it is read, and takes none of the answers."""
    is_well(net, relay)
    before = memory_kb(relay)
    with net.connect(net.host, RELAY) as client:
        client.settimeout(1.0)
        with pytest.raises(TimeoutError):
            client.sendall(framed(seeds()[0]) * 2_000_000)
        is_well(net, relay)
        assert memory_kb(relay) - before < MAX_GROWTH_KB


@pytest.mark.parametrize("hostile", [b"", b"\0" * 12, b"\xff" * 65000, b"\0" * 11])
def test_a_server_that_sends_anything(tmp_path: Path, hostile: bytes) -> None:
    draw = random.Random(SEED)

    def serve(message: bytes) -> list[bytes]:
        forged = [mutated(draw, answer_to(message, 66)[:3] + b"\x83" + message[4:]) for _ in range(5)]
        return [hostile, *(each for each in forged if each[:2] != message[:2]), answer_to(message, 1)]

    with (
        dns_net.network() as net,
        name_server(net, PEER4, serve),
        relay_for(net, tmp_path, PEER4) as (_, relay),
    ):
        for _ in range(20):
            assert ask(net, PEER4) == answer_to(query(0x1234), 1)
        assert relay.process.poll() is None
