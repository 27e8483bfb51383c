"""The relay's DNS listener, asked by real clients through real redirection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import (
    PATIENT,
    PEER_SECOND,
    QUESTION,
    SERVFAIL,
    SOON,
    answer_to,
    ask,
    drained,
    framed,
    name_server,
    query,
    read_framed,
    readable,
    relay_for,
)
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, Net, Server
from tpctl.relay.dns.waiting import KEPT, MAX_PENDING, OF_OTHERS

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as network:
        yield network


def answer_over_tcp(client: socket.socket, _peer: object) -> None:
    """Answers one query."""
    client.sendall(framed(answer_to(read_framed(client), 3)))


@pytest.mark.parametrize("asked", [PEER4, PEER6, "127.0.0.53", "127.0.0.1", "::1", HOST4, HOST6, "192.0.2.77"])
def test_an_answer_comes_from_the_address_that_was_asked(net: Net, tmp_path: Path, asked: str) -> None:
    relay_net.run("ip", "-n", net.host, "route", "replace", "default", "via", PEER4)
    with name_server(net, PEER4, lambda message: [answer_to(message, 1)]), relay_for(net, tmp_path, PEER4):
        assert ask(net, asked) == answer_to(query(0x1234), 1)


@pytest.mark.parametrize("asked", [HOST4, HOST6])
def test_a_direct_query_of_a_peer_is_answered_from_the_address_it_asked(net: Net, tmp_path: Path, asked: str) -> None:
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    with (
        name_server(net, PEER6, lambda message: [answer_to(message, 6)]),
        relay_for(net, tmp_path, PEER6),
        net.datagram(net.peer, family) as client,
    ):
        client.connect((asked, 15053))
        client.send(query(7))
        assert client.recv(4096) == answer_to(query(7), 6)


def test_ids_and_ports_are_not_those_of_the_client_and_differ(net: Net, tmp_path: Path) -> None:
    with name_server(net, PEER4, lambda message: [answer_to(message, 1)]) as server, relay_for(net, tmp_path, PEER4):
        for _ in range(20):
            ask(net, PEER4, 1)
    assert len({port for port, _ in server.seen}) > 10
    assert len({identifier for _, identifier in server.seen}) > 10


def test_many_queries_at_once_get_their_own_answers(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER4, lambda message: [answer_to(message, 1)]),
        relay_for(net, tmp_path, PEER4),
        net.datagram(net.host, socket.AF_INET) as client,
    ):
        client.connect((PEER4, 53))
        for identifier in range(100):
            client.send(query(identifier))
        answers = {client.recv(4096) for _ in range(100)}
    assert answers == {answer_to(query(identifier), 1) for identifier in range(100)}


def test_answers_that_were_not_asked_for_are_ignored(net: Net, tmp_path: Path) -> None:
    def serve(message: bytes) -> list[bytes]:
        forged = bytes((message[0] ^ 1,)) + message[1:]
        return [answer_to(forged, 66), message, b"x", answer_to(message, 1)]

    with name_server(net, PEER4, serve), relay_for(net, tmp_path, PEER4):
        assert ask(net, PEER4) == answer_to(query(0x1234), 1)


def test_the_next_server_is_asked_when_the_first_is_silent(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER4, lambda _message: []) as silent,
        name_server(net, PEER_SECOND, lambda message: [answer_to(message, 2)]),
        relay_for(net, tmp_path, PEER4, PEER_SECOND, resolv_options=""),
    ):
        started = time.monotonic()
        assert ask(net, PEER4) == answer_to(query(0x1234), 2)
        assert time.monotonic() - started > 1.5
        assert len(silent.seen) == 1


def test_the_next_server_is_asked_at_once_when_the_first_does_not_listen(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER_SECOND, lambda message: [answer_to(message, 2)]),
        relay_for(net, tmp_path, PEER4, PEER_SECOND),
    ):
        assert ask(net, PEER4, patience=SOON) == answer_to(query(0x1234), 2)


def test_without_a_server_that_answers_the_query_fails(net: Net, tmp_path: Path) -> None:
    with relay_for(net, tmp_path, PEER4):
        answer = ask(net, PEER4)
    assert answer[:2] == b"\x12\x34"
    assert answer[3] & 0x0F == SERVFAIL
    assert answer.endswith(QUESTION)


def test_changes_of_resolv_conf_are_followed(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER_SECOND, lambda message: [answer_to(message, 2)]),
        relay_for(net, tmp_path) as (path, _),
    ):
        assert ask(net, PEER4)[3] & 0x0F == SERVFAIL
        path.write_text(f"nameserver {PEER_SECOND}\n")
        relay_net.until(lambda: ask(net, PEER4) == answer_to(query(0x1234), 2))


@pytest.mark.parametrize("asked", [PEER4, PEER6])
def test_queries_over_tcp_reach_a_server_that_listens(net: Net, tmp_path: Path, asked: str) -> None:
    server = Server(net.listen(net.peer, (PEER_SECOND, 53)), answer_over_tcp)
    try:
        with relay_for(net, tmp_path, PEER4, PEER_SECOND), net.connect(net.host, (asked, 53)) as client:
            client.sendall(framed(query(5)))
            client.shutdown(socket.SHUT_WR)
            assert relay_net.read_all(client)[2:] == answer_to(query(5), 3)
    finally:
        server.close()


def test_queries_that_come_back_to_the_relay_end(net: Net, tmp_path: Path) -> None:
    """Run as another user than the policy's, the relay would ask itself for ever."""
    path = readable(tmp_path, "resolv.conf", f"nameserver {PEER4}\n")
    try:
        with relay_net.relay(net, tmp_path, "--resolv-conf", str(path), user="daemon") as running:
            with net.datagram(net.host, socket.AF_INET) as client:
                client.connect((PEER4, 53))
                client.send(query(9))
                running.wait_for("dropped: the relay's own DNS queries")
            with pytest.raises(ConnectionResetError), net.connect(net.host, (PEER4, 8080)) as refused:
                refused.recv(1)
            running.wait_for("refused: the relay's own connections")
    finally:
        path.unlink()


def test_a_query_that_is_under_way_is_answered_while_draining(net: Net, tmp_path: Path) -> None:
    is_draining = threading.Event()

    def late(message: bytes) -> list[bytes]:
        is_draining.wait(SOON)
        return [answer_to(message, 1)]

    path = readable(tmp_path, "resolv.conf", f"nameserver {PEER4}\n{PATIENT}")
    running = relay_net.Relay(net, tmp_path, "--resolv-conf", str(path))
    try:
        running.wait_for("ready")
        with name_server(net, PEER4, late) as server, net.datagram(net.host, socket.AF_INET) as client:
            client.connect((PEER4, 53))
            client.send(query(3))
            relay_net.until(lambda: server.seen)
            running.process.terminate()
            assert running.wait_for("draining")["queries"] == 1
            is_draining.set()
            assert client.recv(4096) == answer_to(query(3), 1)
            assert running.exit_code() == 0
    finally:
        running.stop()
        path.unlink()


OWN_PENDING = MAX_PENDING - KEPT[OF_OTHERS]
"""That many clients of this host may wait."""


def test_no_more_queries_wait_than_the_table_holds(net: Net, tmp_path: Path) -> None:
    """Beyond that they fail at once, so that a client does not wait in vain."""
    with (
        name_server(net, PEER4, lambda _message: []),
        relay_for(net, tmp_path, PEER4),
        net.datagram(net.host, socket.AF_INET) as client,
    ):
        client.connect((PEER4, 53))
        for identifier in range(OWN_PENDING + 50):
            client.send(query(identifier))
            if identifier % 64 == 0:
                relay_net.until(lambda: drained(net, net.host, 15053))  # a burst would overflow its buffer
        client.settimeout(SOON)
        failed = [client.recv(4096) for _ in range(50)]
    assert {answer[3] & 0x0F for answer in failed} == {SERVFAIL}
    assert {int.from_bytes(answer[:2], "big") for answer in failed} == set(range(OWN_PENDING, OWN_PENDING + 50))


def test_over_tcp_a_server_that_does_not_answer_is_given_up(net: Net, tmp_path: Path) -> None:
    drop = ("INPUT", "-p", "tcp", "-d", PEER4, "--dport", "53", "-j", "DROP")
    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}", "iptables", "-w")
    relay_net.run(*on_peer, "-A", *drop)
    server = Server(net.listen(net.peer, (PEER_SECOND, 53)), answer_over_tcp)
    try:
        with (
            relay_for(net, tmp_path, PEER4, PEER_SECOND, resolv_options=""),
            net.connect(net.host, (PEER4, 53)) as client,
        ):
            client.sendall(framed(query(5)))
            client.shutdown(socket.SHUT_WR)
            assert relay_net.read_all(client)[2:] == answer_to(query(5), 3)
    finally:
        server.close()
        relay_net.run(*on_peer, "-D", *drop)
