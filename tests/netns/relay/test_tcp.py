"""The relay's TCP side, on real connections through real redirection."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, HOST6, PEER, PEER4, PEER6, TIMEOUT, Net, Relay, Server, until

pytestmark = pytest.mark.root

FAMILIES = [pytest.param(socket.AF_INET, id="v4"), pytest.param(socket.AF_INET6, id="v6")]
BULK = 6 * 1024 * 1024 + 12345


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def running(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that the tests share, with what they leave behind in it."""
    with relay_net.relay(net, tmp_path_factory.mktemp("relay"), "--access-log") as started:
        yield started


@contextlib.contextmanager
def serving(listener: socket.socket, serve: Callable[[socket.socket, object], None]) -> Iterator[Server]:
    server = Server(listener, serve)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_inbound_reaches_the_port_that_was_meant_from_the_passthrough_address(
    net: Net, running: Relay, family: socket.AddressFamily
) -> None:
    passthrough = {socket.AF_INET: "127.0.0.6", socket.AF_INET6: "::6"}[family]
    with (
        serving(net.listen(net.host, (HOST[family], 8080)), relay_net.say_who("application")),
        net.connect(net.peer, (HOST[family], 8080)) as client,
    ):
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["application", passthrough, HOST[family], 8080]


@pytest.mark.parametrize("family", FAMILIES)
def test_outbound_reaches_the_server_that_was_meant(net: Net, running: Relay, family: socket.AddressFamily) -> None:
    with (
        serving(net.listen(net.peer, (PEER[family], 8443)), relay_net.say_who("server")),
        net.connect(net.host, (PEER[family], 8443)) as client,
    ):
        answer = json.loads(relay_net.read_all(client))
    assert answer == ["server", HOST[family], PEER[family], 8443]

    def logged() -> bool:
        lines = [line for line in running.lines() if line["event"] == "connection" and line["role"] == "outbound"]
        return any(line["client"] == HOST[family] and line["error"] is None for line in lines)

    until(logged)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["inbound", "outbound"])
def test_half_close_and_bulk_streams_arrive_whole_both_ways(
    net: Net, running: Relay, family: socket.AddressFamily, direction: str
) -> None:
    server, client_side, addresses = (
        (net.host, net.peer, HOST) if direction == "inbound" else (net.peer, net.host, PEER)
    )
    sent = relay_net.pattern(BULK)
    with (
        serving(net.listen(server, (addresses[family], 9000)), relay_net.digest_service(BULK)),
        net.connect(client_side, (addresses[family], 9000)) as client,
    ):
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = relay_net.read_all(client)
    assert answer[:32] == digest(sent)
    assert answer[32:] == sent


def test_both_directions_at_once_with_a_slow_reader(net: Net, running: Relay) -> None:
    sent = relay_net.pattern(BULK)

    def slow_echo(client: socket.socket, _peer: object) -> None:
        reader = threading.Thread(target=lambda: received.append(relay_net.read_digest(client)))
        time.sleep(0.2)  # the relay's pipe and the socket buffers fill up meanwhile
        reader.start()
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        reader.join(TIMEOUT)

    received: list[bytes] = []
    with serving(net.listen(net.peer, (PEER4, 9001)), slow_echo), net.connect(net.host, (PEER4, 9001)) as client:
        sender = threading.Thread(target=send_all, args=(client, sent))
        sender.start()
        time.sleep(0.4)
        arrived = relay_net.read_digest(client)
        sender.join(TIMEOUT)
        until(lambda: bool(received))
    assert arrived == received[0] == digest(sent)


def test_a_server_that_ends_first_can_still_be_sent_to(net: Net, running: Relay) -> None:
    got: list[bytes] = []

    def finish_first(client: socket.socket, _peer: object) -> None:
        client.sendall(b"bye")
        client.shutdown(socket.SHUT_WR)
        got.append(relay_net.read_all(client))

    with (
        serving(net.listen(net.peer, (PEER4, 9002)), finish_first),
        net.connect(net.host, (PEER4, 9002)) as client,
    ):
        assert relay_net.read_all(client) == b"bye"
        send_all(client, b"late")
        until(lambda: got == [b"late"])


def test_small_messages_to_and_fro(net: Net, running: Relay) -> None:
    with (
        serving(net.listen(net.peer, (PEER6, 9003)), relay_net.echo),
        net.connect(net.host, (PEER6, 9003)) as client,
    ):
        for number in range(500):
            message = b"x" * (number % 90 + 1)
            client.sendall(message)
            assert exactly(client, len(message)) == message


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, "the stream ended early"
        data += more
    return data


def test_many_connections_at_once(net: Net, running: Relay) -> None:
    def one(number: int) -> bool:
        message = f"{number:08}".encode() * 200
        with net.connect(net.host, (PEER4, 9004)) as client:
            client.sendall(message)
            assert exactly(client, len(message)) == message
            barrier.wait(TIMEOUT)  # all of them are open now
            client.sendall(message)
            client.shutdown(socket.SHUT_WR)
            return relay_net.read_all(client) == message

    count = 150
    barrier = threading.Barrier(count)
    with serving(net.listen(net.peer, (PEER4, 9004)), relay_net.echo), ThreadPoolExecutor(count) as pool:
        assert all(pool.map(one, range(count)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("port", [15006, 15001, 15053])
def test_the_relay_does_not_dial_itself_for_a_peer(
    net: Net, running: Relay, family: socket.AddressFamily, port: int
) -> None:
    assert_reset(net, net.peer, (HOST[family], port))
    assert_few_descriptors(running)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", HOST4, HOST6])
@pytest.mark.parametrize("port", [15006, 15001])
def test_the_relay_does_not_dial_itself_for_this_host(net: Net, running: Relay, address: str, port: int) -> None:
    assert_reset(net, net.host, (address, port))
    assert_few_descriptors(running)


def assert_reset(net: Net, name: str, address: tuple[str, int]) -> None:
    """The relay accepts before it knows; its reset may come before connect() has returned, or after."""
    with pytest.raises(ConnectionResetError), net.connect(name, address) as client:
        relay_net.read_all(client)


def assert_few_descriptors(running: Relay) -> None:
    """A loop of the relay through itself ends only when its descriptors do."""
    until(lambda: len(list(Path(f"/proc/{running.process.pid}/fd").iterdir())) < 100)


def test_a_port_of_the_relay_on_another_host_can_be_dialled(net: Net, running: Relay) -> None:
    with (
        serving(net.listen(net.peer, (PEER4, 15001)), relay_net.say_who("the other relay")),
        net.connect(net.host, (PEER4, 15001)) as client,
    ):
        assert json.loads(relay_net.read_all(client))[0] == "the other relay"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["inbound", "outbound"])
def test_a_refused_dial_resets_the_client(
    net: Net, running: Relay, family: socket.AddressFamily, direction: str
) -> None:
    name, addresses = (net.peer, HOST) if direction == "inbound" else (net.host, PEER)
    assert_reset(net, name, (addresses[family], 9))


def test_a_reset_of_the_client_reaches_the_server(net: Net, running: Relay) -> None:
    seen: list[int | None] = []

    def serve(client: socket.socket, _peer: object) -> None:
        client.sendall(b"hello")
        try:
            relay_net.read_all(client)
            seen.append(None)
        except OSError as error:
            seen.append(error.errno)

    with serving(net.listen(net.peer, (PEER4, 9005)), serve):
        client = net.connect(net.host, (PEER4, 9005))
        exactly(client, 5)
        reset(client)
        until(lambda: bool(seen))
    assert seen == [errno.ECONNRESET]


def test_a_reset_of_the_server_reaches_a_client_that_is_not_reading(net: Net, running: Relay) -> None:
    def serve(client: socket.socket, _peer: object) -> None:
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            client.sendall(relay_net.pattern(64 * 1024 * 1024))
        reset(client)

    with serving(net.listen(net.peer, (PEER4, 9006)), serve), net.connect(net.host, (PEER4, 9006)) as client:
        time.sleep(0.8)
        with pytest.raises(ConnectionResetError):
            relay_net.read_all(client)


def test_a_client_that_ends_while_nothing_is_read_costs_no_cpu(net: Net, running: Relay) -> None:
    """Both halves of the client's connection are over while its last bytes wait: epoll reports that for ever."""
    release = threading.Event()
    digests: list[bytes] = []

    def serve(client: socket.socket, _peer: object) -> None:
        client.shutdown(socket.SHUT_WR)
        release.wait(TIMEOUT)
        digests.append(relay_net.read_digest(client))

    listener = net.listen(net.peer, (PEER4, 9007))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with serving(listener, serve), net.connect(net.host, (PEER4, 9007)) as client:
        assert client.recv(1) == b""
        block = relay_net.pattern(65536)
        sent = 0
        while not relay_has_stopped_reading(net, client):
            client.sendall(block)
            sent += 1
        client.shutdown(socket.SHUT_WR)
        # The relay's end has sent its own end and got the client's: the kernel has nothing more to do for it.
        until(lambda: relay_side(net, client).startswith("TIME-WAIT"))
        before = cpu_seconds(running.process.pid)
        time.sleep(0.5)
        assert cpu_seconds(running.process.pid) - before < 0.1
        release.set()
        until(lambda: bool(digests))
    assert digests == [digest(block * sent)]


def relay_side(net: Net, client: socket.socket) -> str:
    """The relay's end of a client's connection, as ss(8) shows it: state, bytes unread, ..."""
    port = client.getsockname()[1]
    return net.on_host("ss", "-Htna", f"( sport = :15001 and dport = :{port} )")


def relay_has_stopped_reading(net: Net, client: socket.socket) -> bool:
    """Whether bytes wait unread in the relay's end."""
    time.sleep(0.02)
    return int(relay_side(net, client).split()[1]) > 0


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
