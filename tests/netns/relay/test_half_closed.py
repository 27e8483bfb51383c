"""Half-closed connections that are silent for longer than conntrack remembers them (docs/relay.md)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, PEER, TIMEOUT, Net, Server
from tests.netns.relay.test_listeners import configured

pytestmark = pytest.mark.root

REMEMBERED = 12
"""Seconds. The relay has its probes sent within half of it, and the rest is what it may come late by."""
SILENCE = REMEMBERED + 4
QUESTION, ANSWER = b"question", b"answer"


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network() as network:
        for state in ("fin_wait", "close_wait", "last_ack", "time_wait"):
            network.on_host("sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_timeout_{state}={REMEMBERED}")
        yield network


def answer_late(client: socket.socket, _peer: object) -> None:
    """Take all, and answer after the silence."""
    assert relay_net.read_all(client) == QUESTION
    time.sleep(SILENCE)
    client.sendall(ANSWER)


def take_late(client: socket.socket, _peer: object) -> None:
    """Take nothing before the silence, and answer with how much it was."""
    time.sleep(SILENCE)
    client.sendall(len(relay_net.read_all(client)).to_bytes(8, "big"))


def asked(client: socket.socket, patience: float = 30.0) -> bytes:
    """The answer; nothing when the connection breaks, or hangs for so many seconds more."""
    client.settimeout(SILENCE + patience)
    try:
        client.shutdown(socket.SHUT_WR)
        return relay_net.read_all(client)
    except (ConnectionError, TimeoutError):
        return b""


def send_until_nobody_reads(net: Net, client: socket.socket) -> int:
    """Send until bytes wait for the relay, which cannot pass them on. Returns how many were sent."""
    port, sent = client.getsockname()[1], 0
    while True:
        client.sendall(bytes(65536))
        sent += 65536
        time.sleep(0.01)
        waiting = net.on_host("ss", "-Htn", "sport", "=", ":15006", "and", "dport", "=", f":{port}").split()[1]
        if int(waiting):
            return sent


def waits(net: Net, *where: str) -> bool:
    """Whether bytes wait for the process behind a socket of the host."""
    return any(int(line.split()[1]) for line in net.on_host("ss", "-Htn", *where).splitlines())


def gone(net: Net, port: int) -> bool:
    """Whether the host's kernel has forgotten both ends of the connections to a port, orphans too."""
    return not net.on_host(
        "ss", "-Htna", "state", "connected", "(", "sport", "=", f":{port}", "or", "dport", "=", f":{port}", ")"
    )


@pytest.fixture
def forgetful(net: Net) -> Net:
    """Kernels that let go of what a process has closed after two seconds, not a minute, so that probes find nobody."""
    net.on_host("sysctl", "-qw", "net.ipv4.tcp_fin_timeout=2")
    with net.inside(net.peer):
        relay_net.run("sysctl", "-qw", "net.ipv4.tcp_fin_timeout=2")
    return net


@pytest.mark.parametrize("little", [True, False], ids=["sent", "not sent"])
@pytest.mark.parametrize("ends", [True, False], ids=["the client ends meanwhile", "the client ends last"])
def test_a_slow_client_gets_all_of_a_server_that_has_gone(
    forgetful: Net, tmp_path: Path, little: bool, ends: bool
) -> None:
    """`little` is sent to the client by the relay's kernel, the end too; of more, the rest waits in the relay."""
    net, done = forgetful, threading.Event()
    sent: list[int] = []

    def send_and_go(client: socket.socket, _peer: object) -> None:
        client.settimeout(TIMEOUT)
        while not sum(sent) if little else not waits(net, "dport", "=", ":8080"):
            client.sendall(bytes(500_000))
            sent.append(500_000)
        client.close()
        done.set()

    with ExitStack() as stack:
        stack.enter_context(relay_net.relay(net, tmp_path))
        stack.callback(Server(net.listen(net.host, (HOST4, 8080)), send_and_go).close)
        client = stack.enter_context(net.connect(net.peer, (HOST4, 8080)))
        assert done.wait(TIMEOUT)
        relay_net.until(lambda: gone(net, 8080))
        if ends:
            client.shutdown(socket.SHUT_WR)
        assert len(relay_net.read_all(client)) == sum(sent)


def test_a_slow_server_gets_all_of_a_client_that_has_gone(forgetful: Net, tmp_path: Path) -> None:
    net, may_read, done = forgetful, threading.Event(), threading.Event()
    got: list[int] = []

    def take_when_told(client: socket.socket, _peer: object) -> None:
        assert may_read.wait(TIMEOUT)
        got.append(len(relay_net.read_all(client)))
        done.set()

    with ExitStack() as stack:
        stack.enter_context(relay_net.relay(net, tmp_path))
        stack.callback(Server(net.listen(net.host, (HOST4, 8080)), take_when_told).close)
        client = stack.enter_context(net.connect(net.peer, (HOST4, 8080)))
        sent = send_until_nobody_reads(net, client)
        client.close()
        relay_net.until(lambda: gone(net, 15006))
        may_read.set()
        assert done.wait(TIMEOUT)
        assert got == [sent]


def test_they_are_kept(net: Net, tmp_path: Path) -> None:
    answers: dict[str, bytes] = {}

    def ask(name: str, client: socket.socket) -> None:
        answers[name] = asked(client)

    with ExitStack() as stack:
        stack.enter_context(relay_net.relay(net, tmp_path))
        threads = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for place, source, addresses in ((net.host, net.peer, HOST), (net.peer, net.host, PEER)):
                stack.callback(Server(net.listen(place, (addresses[family], 8080)), answer_late).close)
                client = stack.enter_context(net.connect(source, (addresses[family], 8080)))
                client.sendall(QUESTION)
                threads.append(threading.Thread(target=ask, args=(f"{source} {family.name}", client)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    assert {name: answer for name, answer in answers.items() if answer != ANSWER} == {}


def test_one_is_kept_whose_end_waits_behind_bytes_that_nobody_takes(net: Net, tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(relay_net.relay(net, tmp_path))
        stack.callback(Server(net.listen(net.host, (HOST4, 8080)), take_late).close)
        client = stack.enter_context(net.connect(net.peer, (HOST4, 8080)))
        sent = send_until_nobody_reads(net, client)
        assert asked(client) == sent.to_bytes(8, "big")


def test_they_are_left_alone_when_keep_alive_is_off(net: Net, tmp_path: Path) -> None:
    """And it is conntrack that breaks them."""
    text = 'listeners: [{listen: "*:15006 so_keepalive=off", direction: inbound}]\n'
    with configured(net, tmp_path, text), ExitStack() as stack:
        stack.callback(Server(net.listen(net.host, (HOST4, 8080)), answer_late).close)
        client = stack.enter_context(net.connect(net.peer, (HOST4, 8080)))
        client.sendall(QUESTION)
        assert asked(client, 2.0) == b""
