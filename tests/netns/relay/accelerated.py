"""Connections that the kernel moves: both ends of one, and what the relay's maps hold of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.lab import checksum
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER4, Net, Relay, until
from tests.netns.relay.test_operation import scrape
from tpctl.bpf import syscall
from tpctl.relay.connections.acceleration import _STREAM, ENOUGH

LONG = 60.0
BULK = 24 * 1024 * 1024 + 4321
METRICS = ("--metrics", "127.0.0.1:9902")
ACTIVE = 'connections_active{listener="outbound"}'
BEGUN = 'accelerated_streams_total{step="begun"}'
TAKEN_BACK = 'accelerated_streams_total{step="taken_back"}'


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


@pytest.fixture
def apart() -> Iterator[Net]:
    """For a test with a relay of its own."""
    with relay_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def running(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that the tests share, run as a user without any capability."""
    with relaying(net, tmp_path_factory.mktemp("relay")) as started:
        yield started


def relaying(net: Net, directory: Path, *options: str) -> contextlib.AbstractContextManager[Relay]:
    return relay_net.relay(net, directory, "--access-log", "--accelerate", "sockmap", *METRICS, *options)


class Pair:
    """Both ends of a connection through the relay."""

    def __init__(self, net: Net, host: str = PEER4) -> None:
        self.net = net
        with net.listen(net.peer, (host, 0)) as listener:
            self.client = net.connect(net.host, listener.getsockname()[:2])
            listener.settimeout(relay_net.TIMEOUT)
            self.server, _ = listener.accept()
            self.port = listener.getsockname()[1]
        for end in (self.client, self.server):
            end.settimeout(LONG)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self.server.close()

    def talk(self, times: int) -> None:
        """So many small requests and answers."""
        for number in range(times):
            for source, sink in ((self.client, self.server), (self.server, self.client)):
                message = number.to_bytes(4, "big") * 25
                source.sendall(message)
                assert exactly(sink, len(message)) == message


def accelerated(net: Net, host: str = PEER4) -> Pair:
    """A connection that was talked over until the kernel had both directions."""
    before = scrape(net, 9902)[BEGUN]
    pair = Pair(net, host)
    pair.talk(ENOUGH)
    until(lambda: scrape(net, 9902)[BEGUN] >= before + 2)
    return pair


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def descriptors(pid: int) -> dict[str, int]:
    """The descriptors of the relay's maps, as this process's own, by the name of the map."""
    found = {}
    names = {"targets", "sources", "streams", "ended"}
    handle = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a connection has just ended
                if "bpf-map" in str(entry.readlink()):
                    copy = pidfd_getfd(handle, int(entry.name))
                    found[syscall.map_info(copy).name] = copy
    finally:
        os.close(handle)
    assert found.keys() == names
    return found


def pidfd_getfd(handle: int, number: int) -> int:
    copy = int(relay_net.LIBC.syscall(438, handle, number, 0))
    assert copy >= 0
    return copy


def entries(pid: int) -> dict[str, int]:
    """How many entries each map of the relay has."""
    maps = descriptors(pid)
    try:
        return {name: len(list(syscall.keys(copy, 8))) for name, copy in maps.items()}
    finally:
        for copy in maps.values():
            os.close(copy)


def streams_that_are_over(pid: int) -> int:
    """How many streams the program has left to the relay."""
    maps = descriptors(pid)
    try:
        found = [syscall.lookup(maps["streams"], key, _STREAM.size) for key in syscall.keys(maps["streams"], 8)]
        return sum(bool(_STREAM.unpack(value)[1]) for value in found if value)
    finally:
        for copy in maps.values():
            os.close(copy)


NOTHING = {"targets": 0, "sources": 0, "streams": 0, "ended": 0}


def ended_with(running: Relay, pair: Pair) -> dict[str, Any]:
    """The access log's line of a connection."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [line for line in running.lines() if str(line.get("destination", "")).endswith(f":{pair.port}")]
        return bool(found)

    until(is_there)
    return found[0]


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def sending(sock: socket.socket, data: bytes, then: Callable[[socket.socket], None] | None = None) -> threading.Thread:
    def work() -> None:
        sock.sendall(data)
        if then is not None:
            then(sock)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def end(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
OFF_AND_SILENT = -1
"""linux/tcp.h: TCP_REPAIR_OFF_NO_WP."""


PSH_ACK = 0x18


def forge(sock: socket.socket, ahead: int, known: bytes, new: bytes) -> None:
    """Send a segment in a socket's name (IPv4), in its namespace: what came last again, and something new behind it.

    The socket knows nothing of that: `ahead` is how many bytes were forged before.
    """
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    numbers = {}
    for queue in (RECEIVE_QUEUE, SEND_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers[queue] = sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_AND_SILENT)
    (here, port), (there, its_port) = sock.getsockname(), sock.getpeername()
    first = (numbers[SEND_QUEUE] + ahead - len(known)) & 0xFFFFFFFF
    segment = struct.pack(
        ">HHIIBBHHH", port, its_port, first, numbers[RECEIVE_QUEUE], 5 << 4, PSH_ACK, 512, 0, 0
    ) + known + new  # fmt: skip
    pseudo = socket.inet_aton(here) + socket.inet_aton(there) + struct.pack(">HH", socket.IPPROTO_TCP, len(segment))
    segment = segment[:16] + struct.pack(">H", checksum(pseudo + segment)) + segment[18:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(segment, (there, 0))


def wakeups(pid: int) -> int:
    """How often the process has gone to sleep."""
    (line,) = (one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("voluntary"))
    return int(line.split()[1])
