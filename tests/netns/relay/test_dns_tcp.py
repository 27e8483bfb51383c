"""DNS over TCP through the relay: frames in any pieces, servers that close, hang or are missing, clients that leave."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import PEER_SECOND, SERVFAIL, answer_to, framed, query, read_framed, relay_for
from tests.netns.relay.net import PEER4, Net, Server
from tpctl.relay.dns.tcp import KEPT, MAX_CLIENTS, MAX_PENDING_PER_CLIENT
from tpctl.relay.dns.waiting import OF_OTHERS

pytestmark = pytest.mark.root

Serve = Callable[[socket.socket, Any], None]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as network:
        # The relay's own connections to the name server end with resets. A client here that has the port of one next,
        # within the ten seconds of the kernel, would go past the relay.
        network.on_host("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_close=0")
        yield network


@pytest.fixture
def server(net: Net) -> Iterator[Callable[[Serve, str], Server]]:
    """Starts a TCP name server at an address of the peer."""
    running: list[Server] = []

    def start(serve: Serve, address: str = PEER4) -> Server:
        running.append(Server(net.listen(net.peer, (address, 53)), serve))
        return running[-1]

    yield start
    for each in running:
        each.close()


Start = Callable[..., Server]


def in_order(last: int) -> Serve:
    def serve(client: socket.socket, _peer: Any) -> None:
        while message := read_framed(client):
            client.sendall(framed(answer_to(message, last)))

    return serve


def one_a_connection(client: socket.socket, _peer: Any) -> None:
    client.sendall(framed(answer_to(read_framed(client), 1)))


def silence(client: socket.socket, _peer: Any) -> None:
    while client.recv(4096):
        pass


def test_pieces_of_any_size(net: Net, server: Start, tmp_path: Path) -> None:
    server(in_order(1))
    stream = b"".join(framed(query(number)) for number in range(5))
    with relay_for(net, tmp_path, PEER4):
        for size in (1, 3, 30, len(stream)):
            with net.connect(net.host, (PEER4, 53)) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for begin in range(0, len(stream), size):
                    client.sendall(stream[begin : begin + size])
                for number in range(5):
                    assert read_framed(client) == answer_to(query(number), 1)


def test_one_connection_to_the_server_is_kept_for_a_client(net: Net, server: Start, tmp_path: Path) -> None:
    running = server(in_order(1))
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        for number in range(5):
            client.sendall(framed(query(number)))
            assert read_framed(client) == answer_to(query(number), 1)
    assert len(running.peers) == 1


def test_equal_ids_of_a_client_are_told_apart(net: Net, server: Start, tmp_path: Path) -> None:
    server(in_order(1))
    messages = [query(7), query(7, dns_net.QUESTION.replace(b"example", b"sibling"))]
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(b"".join(map(framed, messages)))
        assert [read_framed(client) for _ in messages] == [answer_to(message, 1) for message in messages]


def test_answers_come_as_they_are_ready(net: Net, server: Start, tmp_path: Path) -> None:
    def backwards(client: socket.socket, _peer: Any) -> None:
        for message in reversed([read_framed(client) for _ in range(3)]):
            client.sendall(framed(answer_to(message, 1)))

    server(backwards)
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(b"".join(framed(query(number)) for number in range(3)))
        assert [read_framed(client)[1] for _ in range(3)] == [2, 1, 0]


def test_a_server_that_answers_one_query_a_connection(net: Net, server: Start, tmp_path: Path) -> None:
    running = server(one_a_connection)
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(b"".join(framed(query(number)) for number in range(10)))
        assert {read_framed(client)[1] for _ in range(10)} == set(range(10))
    assert len(running.peers) == 10


@pytest.mark.parametrize("at_once", [1, 20])
def test_a_server_that_resets_the_connection_every_few_queries(
    net: Net, server: Start, tmp_path: Path, at_once: int
) -> None:
    """As dnsmasq does after 100: it closes with queries unread."""

    def serve(client: socket.socket, _peer: Any) -> None:
        for _ in range(3):
            client.sendall(framed(answer_to(read_framed(client), 1)))
        time.sleep(0.01)

    running = server(serve)
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(b"".join(framed(query(number)) for number in range(at_once)))
        for number in range(at_once, 200):
            assert read_framed(client)[3] & 0x0F == 0
            client.sendall(framed(query(number)))
        for _ in range(at_once):
            assert read_framed(client)[3] & 0x0F == 0
    assert len(running.peers) >= 200 / 3


def test_more_queries_than_may_wait_are_all_answered(net: Net, server: Start, tmp_path: Path) -> None:
    server(in_order(1))
    count = MAX_PENDING_PER_CLIENT * 10
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(b"".join(framed(query(number)) for number in range(count)))
        client.shutdown(socket.SHUT_WR)
        assert {int.from_bytes(read_framed(client)[:2], "big") for _ in range(count)} == set(range(count))
        assert client.recv(1) == b"", "closed when everything is answered"


@pytest.mark.parametrize("first", [None, silence, lambda client, _peer: client.recv(10)])
def test_the_next_server_is_asked(net: Net, server: Start, tmp_path: Path, first: Serve | None) -> None:
    """When the first does not listen, does not answer, or hangs up."""
    if first is not None:
        server(first)
    server(in_order(2), PEER_SECOND)
    with (
        relay_for(net, tmp_path, PEER4, PEER_SECOND, resolv_options="options timeout:1\n"),
        net.connect(net.host, (PEER4, 53)) as client,
    ):
        client.sendall(framed(query(1)) + framed(query(2)))
        assert [read_framed(client) for _ in range(2)] == [answer_to(query(1), 2), answer_to(query(2), 2)]
        client.sendall(framed(query(3)))
        assert read_framed(client) == answer_to(query(3), 2)


def test_one_query_without_an_answer_does_not_hold_up_the_others(net: Net, server: Start, tmp_path: Path) -> None:
    def serve(client: socket.socket, _peer: Any) -> None:
        while message := read_framed(client):
            if b"sibling" not in message:
                client.sendall(framed(answer_to(message, 1)))

    running = server(serve)
    with (
        relay_for(net, tmp_path, PEER4, resolv_options="options timeout:5\n"),
        net.connect(net.host, (PEER4, 53)) as client,
    ):
        client.sendall(framed(query(99, dns_net.QUESTION.replace(b"example", b"sibling"))))
        for number in range(4):
            client.sendall(framed(query(number)))
            assert read_framed(client) == answer_to(query(number), 1)
        failed = read_framed(client)
    assert (failed[1], failed[3] & 0x0F) == (99, SERVFAIL)
    assert len(running.peers) == 1


def test_without_a_server_there_is_a_failure_for_each(net: Net, tmp_path: Path) -> None:
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(framed(query(1)) + framed(query(2)))
        assert [(read_framed(client)[3] & 0x0F) for _ in range(2)] == [SERVFAIL, SERVFAIL]


def test_a_forged_answer_on_the_stream_is_ignored(net: Net, server: Start, tmp_path: Path) -> None:
    def serve(client: socket.socket, _peer: Any) -> None:
        message = read_framed(client)
        for forged in (bytes((message[0] ^ 1,)) + message[1:], message.replace(b"example", b"examplf")):
            client.sendall(framed(answer_to(forged, 66)))
        client.sendall(framed(message) + framed(b"") + framed(answer_to(message, 1)))

    server(serve)
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(framed(query(1)))
        assert read_framed(client) == answer_to(query(1), 1)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", framed(b"x"), framed(b""), framed(answer_to(query(1), 1))]
)
def test_what_is_no_query_ends_the_connection(net: Net, tmp_path: Path, garbage: bytes) -> None:
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_query_without_a_question_is_a_format_error(net: Net, tmp_path: Path) -> None:
    with relay_for(net, tmp_path, PEER4), net.connect(net.host, (PEER4, 53)) as client:
        client.sendall(framed(query(1)[:4] + bytes(8)))
        assert read_framed(client) == b"\0\1\x81\x81" + bytes(8)


def test_clients_beyond_the_limit_take_the_place_of_the_idlest(net: Net, server: Start, tmp_path: Path) -> None:
    server(in_order(1))
    with relay_for(net, tmp_path, PEER4), contextlib.ExitStack() as around:
        clients = [
            around.enter_context(net.connect(net.host, (PEER4, 53))) for _ in range(MAX_CLIENTS - KEPT[OF_OTHERS] + 1)
        ]
        clients[-1].sendall(framed(query(1)))
        assert read_framed(clients[-1]) == answer_to(query(1), 1)
        assert clients[0].recv(1) == b""
        clients[1].sendall(framed(query(2)))
        assert read_framed(clients[1]) == answer_to(query(2), 1)


def test_queries_under_way_are_answered_while_draining(net: Net, server: Start, tmp_path: Path) -> None:
    asked, is_draining = threading.Event(), threading.Event()

    def late(client: socket.socket, _peer: Any) -> None:
        message = read_framed(client)
        asked.set()
        is_draining.wait(relay_net.TIMEOUT)
        client.sendall(framed(answer_to(message, 1)))

    server(late)
    options = ("--drain-timeout", "60")
    with relay_for(net, tmp_path, PEER4, options=options) as (_, relay):
        with net.connect(net.host, (PEER4, 53)) as client, net.connect(net.host, (PEER4, 53)) as idle:
            client.sendall(framed(query(3)))
            assert asked.wait(relay_net.TIMEOUT)
            relay.process.terminate()
            assert relay.wait_for("draining")["queries"] == 1
            is_draining.set()
            assert idle.recv(1) == b""
            assert read_framed(client) == answer_to(query(3), 1)
            assert client.recv(1) == b""
        assert relay.exit_code() == 0
