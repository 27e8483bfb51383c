"""--accelerate sockmap: bytes, ends and resets of connections that the kernel moves."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.netns.relay import accelerated as scene
from tests.netns.relay import net as relay_net
from tests.netns.relay.accelerated import (
    ACTIVE,
    BEGUN,
    BULK,
    LONG,
    NOTHING,
    TAKEN_BACK,
    Pair,
    accelerated,
    digest,
    end,
    ended_with,
    entries,
    exactly,
    forge,
    reset,
    sending,
    streams_that_are_over,
    wakeups,
)
from tests.netns.relay.net import PEER4, PEER6, Net, Relay, until
from tests.netns.relay.test_operation import scrape
from tpctl.relay.connections.acceleration import ENOUGH, SMALL

pytestmark = pytest.mark.root

net = scene.net
running = scene.running


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


@pytest.mark.parametrize("is_taken_back", [False, True])
def test_what_is_sent_again_with_more_behind_it_arrives_once(net: Net, running: Relay, is_taken_back: bool) -> None:
    """A busy sender's timer may fire although half of what it sent has arrived: it then sends all of that again."""
    before = scrape(net, 9902)[TAKEN_BACK]
    with accelerated(net) as pair:
        if is_taken_back:
            sender = sending(pair.server, relay_net.pattern(BULK))
            until(lambda: streams_that_are_over(running.process.pid))
            assert exactly(pair.client, BULK) == relay_net.pattern(BULK)
            sender.join()
            assert scrape(net, 9902)[TAKEN_BACK] == before + 1
        data = os.urandom(20_000)
        for at in range(0, len(data), 1000):
            known, new = data[max(0, at - 5000) : at], data[at : at + 1000]
            with net.inside(net.peer):
                forge(pair.server, at, known, new)
            assert exactly(pair.client, len(new)) == new
        reset(pair.server)
    said = BULK if is_taken_back else 0
    assert ended_with(running, pair)["received"] == 100 * ENOUGH + said + len(data)


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
