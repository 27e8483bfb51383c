"""Connections whose bytes the kernel moves (`--accelerate sockmap`): everything arrives, ends and counts are right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.engines.ebpf import syscall
from agent.errors import HostError
from agent.relay import sockmap
from agent.relay.acceleration import ENOUGH, SMALL, Accelerator, ChattyFlow
from agent.relay.loop import Loop
from agent.relay.pump import PipePool
from tests.netns import relay_net
from tests.netns.relay_net import PEER4, PEER6, Net, Relay, until
from tests.netns.test_relay_operation import scrape

pytestmark = pytest.mark.root
LONG = 60.0
BULK = 24 * 1024 * 1024 + 4321
METRICS = ("--metrics", "127.0.0.1:9902")
ACTIVE = 'connections_active{listener="outbound"}'
BEGUN = 'accelerated_streams_total{step="begun"}'
TAKEN_BACK = 'accelerated_streams_total{step="taken back"}'


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


def wakeups(pid: int) -> int:
    """How often the process has gone to sleep."""
    (line,) = (one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("voluntary"))
    return int(line.split()[1])


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_requests_of_a_chatty_connection_do_not_wake_the_relay(net: Net, running: Relay, host: str) -> None:
    requests = 3000
    with accelerated(net, host) as pair:
        before = wakeups(running.process.pid)
        pair.talk(requests)
        assert wakeups(running.process.pid) - before < requests / 2, "timers, but no messages"
    line = ended_with(running, pair)
    assert (line["sent"], line["received"]) == (100 * (requests + ENOUGH), 100 * (requests + ENOUGH))
    assert (line["reason"], line["error"]) == ("closed", None)


def test_a_connection_with_large_messages_stays(net: Net, running: Relay) -> None:
    before = scrape(net, 9902)[BEGUN]
    message = relay_net.pattern(SMALL + 1)
    with Pair(net) as pair:
        for _ in range(2 * ENOUGH):
            pair.client.sendall(message)
            assert exactly(pair.server, len(message)) == message
            pair.server.sendall(b"!")
            assert exactly(pair.client, 1) == b"!"
    assert scrape(net, 9902)[BEGUN] == before


@pytest.mark.parametrize("round_", range(5))
def test_bytes_that_are_under_way_at_the_switch_keep_their_order(net: Net, running: Relay, round_: int) -> None:
    """Both ends send without waiting for each other, while the connection goes over to the kernel."""
    before = scrape(net, 9902)[BEGUN]
    streams = [b"".join(n.to_bytes(4, "big") for n in range(start, start + 60_000)) for start in (0, 1 << 20)]

    went_over = threading.Event()

    def scatter(sock: socket.socket, data: bytes) -> None:
        for at in range(0, len(data), 97):
            sock.sendall(data[at : at + 97])
            if at % 970 == 0 or not went_over.is_set():  # a busy relay would read it all at once, and stay
                time.sleep(0.0002)
        end(sock)

    with Pair(net) as pair:
        pair.talk(ENOUGH - 1)
        ways = ((pair.client, pair.server, streams[0]), (pair.server, pair.client, streams[1]))
        senders = [threading.Thread(target=scatter, args=(source, data)) for source, _, data in ways]
        with ThreadPoolExecutor(2) as readers:
            arrived = [readers.submit(relay_net.read_digest, sink) for _, sink, _ in ways]
            for sender in senders:
                sender.start()
            while any(sender.is_alive() for sender in senders) and scrape(net, 9902)[BEGUN] < before + 2:
                time.sleep(0.02)
            went_over.set()
            assert [one.result(LONG) for one in arrived] == [digest(data) for data in streams]
    line = ended_with(running, pair)
    said = 100 * (ENOUGH - 1)
    assert (line["sent"], line["received"]) == (said + len(streams[0]), said + len(streams[1]))
    assert line["reason"] == "closed"
    assert scrape(net, 9902)[BEGUN] > before, "it went over"


@pytest.mark.parametrize("size", [0, 1000, BULK])
@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close(net: Net, running: Relay, first: str, size: int) -> None:
    data = relay_net.pattern(size)
    with accelerated(net) as pair:
        one, other = (pair.client, pair.server) if first == "client" else (pair.server, pair.client)
        sender = sending(one, data, end)
        assert relay_net.read_digest(other) == digest(data)
        sender.join()
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):  # the other direction is open
            one.recv(1)
        one.settimeout(LONG)
        sender = sending(other, data + b"the rest", end)
        assert relay_net.read_digest(one) == digest(data + b"the rest")
        sender.join()
    line = ended_with(running, pair)
    assert line["reason"] == "closed"
    assert sorted((line["sent"], line["received"])) == [100 * ENOUGH + size, 100 * ENOUGH + size + 8]
    until(lambda: entries(running.process.pid) == NOTHING)


@pytest.mark.parametrize("who", ["client", "server"])
def test_what_was_sent_before_a_close_arrives_whole_at_a_slow_reader(net: Net, running: Relay, who: str) -> None:
    data = relay_net.pattern(BULK)
    with accelerated(net) as pair:
        sender, reader = (pair.client, pair.server) if who == "client" else (pair.server, pair.client)
        thread = sending(sender, data, socket.socket.close)
        whole = hashlib.sha256()
        for _ in range(20):
            whole.update(reader.recv(5000))
            time.sleep(0.02)
        while more := reader.recv(1 << 20):
            whole.update(more)
        assert whole.digest() == digest(data)
        thread.join()
    assert ended_with(running, pair)["reason"] == "closed"


def test_a_reader_that_stalls_stops_the_sender(net: Net, running: Relay) -> None:
    """What waits in the kernel has a limit, and when the reader goes on, all of it comes."""
    before = scrape(net, 9902)[TAKEN_BACK]
    whole, sent = hashlib.sha256(), 0
    block = os.urandom(65536)
    with accelerated(net) as pair:
        pair.client.settimeout(2)
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 30:
                count = pair.client.send(block)
                whole.update(block[:count])
                sent += count
        assert sent < 128 << 20
        end(pair.client)
        assert relay_net.read_digest(pair.server) == whole.digest()
        assert scrape(net, 9902)[TAKEN_BACK] == before + 1
        # The other direction is still the kernel's.
        pair.server.sendall(b"good bye")
        assert exactly(pair.client, 8) == b"good bye"
    line = ended_with(running, pair)
    assert (line["sent"], line["received"]) == (100 * ENOUGH + sent, 100 * ENOUGH + 8)


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("size", [0, BULK])
def test_a_reset_is_passed_on(net: Net, running: Relay, who: str, size: int) -> None:
    with accelerated(net) as pair:
        one, other = (pair.client, pair.server) if who == "client" else (pair.server, pair.client)
        one.setblocking(False)
        data = relay_net.pattern(size)
        with contextlib.suppress(BlockingIOError):
            while data:
                data = data[one.send(data) :]
        reset(one)
        with pytest.raises(ConnectionResetError):
            relay_net.read_all(other)
    line = ended_with(running, pair)
    assert line["reason"] == ("reset by the client" if who == "client" else "reset by the upstream")
    assert line["error"] == os.strerror(errno.ECONNRESET)
    until(lambda: entries(running.process.pid) == NOTHING)


def test_nothing_is_left_of_many_connections(net: Net, running: Relay) -> None:
    pid = running.process.pid
    until(lambda: entries(pid) == NOTHING)
    until(lambda: scrape(net, 9902)[ACTIVE] == 0)
    before = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    pairs = [Pair(net) for _ in range(40)]
    for pair in pairs:
        pair.talk(ENOUGH)
    until(lambda: entries(pid) == NOTHING | {"targets": 80, "sources": 80, "streams": 80})
    assert scrape(net, 9902)[ACTIVE] == 40
    for pair in pairs:
        with pair:
            pair.talk(1)
    until(lambda: entries(pid) == NOTHING)
    until(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) <= before)


def test_timeouts_see_what_the_kernel_moves(apart: Net, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text(TIMEOUTS)
    tmp_path.chmod(0o755)
    over = threading.Event()

    def go_on(pair: Pair) -> int:
        times = 0
        while not over.wait(0.1):
            pair.talk(1)
            times += 1
        return times

    with (
        relay_net.relay(apart, tmp_path, "--config", str(tmp_path / "relay.yaml"), "--access-log") as running,
        ThreadPoolExecutor(1) as talker,
        accelerated(apart) as busy,
    ):
        try:
            talking = talker.submit(go_on, busy)
            with accelerated(apart) as quiet, accelerated(apart) as half:
                end(half.client)
                assert half.server.recv(1) == b""
                for pair in (quiet, half):
                    with pytest.raises(ConnectionResetError):
                        relay_net.read_all(pair.client)
        finally:
            over.set()
        assert talking.result(LONG) > 3
        busy.talk(1)
        busy.client.close()
        busy.server.close()
        assert ended_with(running, quiet)["reason"] == "idle for too long"
        assert ended_with(running, half)["reason"] == "half-closed for too long"
        assert ended_with(running, busy)["reason"] == "closed"


TIMEOUTS = """
accelerate: sockmap
metrics: 127.0.0.1:9902
limits: {connections: 3}
timeouts: {idle: 4s, half_closed: 3s}
listeners: [{listen: "*:15001", direction: outbound}]
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_restart_hands_the_maps_over_and_keeps_connections(apart: Net, workers: str) -> None:
    """The successor has no privileges of its own."""
    with (
        relay_net.public_directory() as directory,
        relaying(apart, directory, "--workers", workers, "--drain-timeout", "60") as running,
    ):
        old = accelerated(apart)
        running.process.send_signal(signal.SIGUSR2)
        successor = int(running.wait_for("handed over")["successor"])
        try:
            # Until they drain, the old workers may still accept what is meant to be the successor's.
            until(lambda: [line["event"] for line in running.lines()].count("draining") == int(workers))
            old.talk(100)
            until(lambda: scrape(apart, 9902).get(BEGUN) == 0)
            with accelerated(apart) as new:
                new.talk(100)
                assert entries(successor) == NOTHING | {"targets": 4, "sources": 4, "streams": 4}
            with old:
                old.talk(1)
            assert running.process.wait(LONG) == 0
            until(lambda: entries(successor) == NOTHING)
        finally:
            os.kill(successor, signal.SIGTERM)
            until(lambda: not relay_net.is_running(successor))


def test_draining_waits_for_connections_and_ends_those_that_stay(apart: Net, tmp_path: Path) -> None:
    with relaying(apart, tmp_path, "--drain-timeout", "6") as running:
        leaves, stays = accelerated(apart), accelerated(apart)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        with leaves:
            leaves.talk(10)
        stays.talk(10)
        assert running.process.wait(LONG) == 0
        with stays, pytest.raises(ConnectionResetError):
            relay_net.read_all(stays.client)
        assert ended_with(running, leaves)["reason"] == "closed"
        assert ended_with(running, stays)["reason"] == "ended by the relay"


def test_without_room_a_connection_stays_as_it_is(apart: Net) -> None:
    maps = sockmap.load(1)
    with apart.listen(apart.host, ("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        for descriptor in maps:
            stack.callback(os.close, descriptor)
        loop = Loop()
        stack.callback(loop.release)
        accelerator = Accelerator(loop, maps, memoryview(bytearray(10)))
        found = []
        for _ in range(2):
            ends = [apart.connect(apart.host, listener.getsockname()), listener.accept()[0]]
            for one in ends:
                stack.enter_context(one)
            up, down = (
                ChattyFlow(source, sink, accelerator.buffer, PipePool(0)) for source, sink in (ends, (ends[1], ends[0]))
            )
            found.append(accelerator.take_over(up, down, lambda: None))
        assert found[0] is not None
        assert found[1] is None
        assert len(list(syscall.keys(maps.streams, 8))) == 2, "of the first one alone"


def test_who_may_not_is_told_so(apart: Net, tmp_path: Path) -> None:
    running = Relay(apart, tmp_path, "--accelerate", "sockmap", prefix=("setpriv", "--reuid=65534", "--clear-groups"))
    assert running.exit_code() == 2
    assert "CAP_BPF" in running.log_text()
    assert "Traceback" not in running.log_text()


def test_an_old_kernel_is_refused() -> None:
    with pytest.raises(HostError, match=r"Linux 6\.1\.0-28-amd64, and it needs 6\.4"):
        sockmap._require_kernel("6.1.0-28-amd64")
    sockmap._require_kernel("6.4.0")
    sockmap._require_kernel("10.0-rc1")


@pytest.mark.parametrize(("connections", "pairs"), [(0, 65536), (5, 5), (10**9, 1 << 20)])
def test_there_is_room_for_the_connections_that_may_be(connections: int, pairs: int) -> None:
    assert sockmap.pairs_for(connections) == pairs
