"""Errors that nobody expected, in every handler of a real relay: the connection concerned ends, the relay goes on."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import answer_to, framed, name_server, query, read_framed
from tests.netns.relay.net import PEER4, Net, Relay, Server
from tests.netns.relay.test_log import METRICS, figure

pytestmark = pytest.mark.root
FAULT = """
import importlib, sys
from functools import wraps
module, name, attribute = {place!r}
calls = [0]

def failing(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] in {calls!r}:
            raise RuntimeError("an injected fault")
        return function(*args, **kwargs)
    return wrapper

owner = getattr(importlib.import_module(module), name)
before = owner.__dict__[attribute]
if isinstance(before, classmethod):
    setattr(owner, attribute, classmethod(failing(before.__func__)))
else:
    setattr(owner, attribute, failing(before))
sys.argv = sys.argv[3:]
from tpctl.cli.main import main
main()
"""
"""Puts a fault into a method of the relay, which it raises at some of its calls; then it is the relay's own program."""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def peers(net: Net) -> Iterator[None]:
    """An echo server, and a name server over UDP and TCP."""

    def serve(client: socket.socket, _peer: object) -> None:
        while message := read_framed(client):
            client.sendall(framed(answer_to(message, 1)))

    servers = [Server(net.listen(net.peer, (PEER4, 7000)), relay_net.echo),
               Server(net.listen(net.host, ("127.0.0.1", 8080)), relay_net.echo),
               Server(net.listen(net.peer, (PEER4, 53)), serve)]  # fmt: skip
    with name_server(net, PEER4, lambda message: [answer_to(message, 1)]):
        yield
    for server in servers:
        server.close()


def connection(net: Net) -> None:
    with net.connect(net.host, (PEER4, 7000)) as client:
        for _ in range(3):
            client.sendall(b"ping")
            assert client.recv(4) == b"ping"


def connection_with_urgent_data(net: Net) -> None:
    """It is not moved as small messages are."""
    with net.connect(net.host, (PEER4, 7000)) as client:
        client.send(b"!", socket.MSG_OOB)
        for _ in range(3):
            client.sendall(b"ping")
            assert client.recv(4) == b"ping"


def query_over_udp(net: Net, patience: float = relay_net.TIMEOUT) -> None:
    assert dns_net.ask(net, PEER4, patience=patience) == answer_to(query(0x1234), 1)


def quick_query(net: Net) -> None:
    """Of which nobody may hear any more."""
    query_over_udp(net, 3)


def query_over_tcp(net: Net) -> None:
    with net.connect(net.host, (PEER4, 53)) as client:
        for number in range(3):
            client.sendall(framed(query(number)))
            assert read_framed(client) == answer_to(query(number), 1)


def scrape(net: Net) -> None:
    figure(net, "workers")


WAYS = (connection, query_over_udp, query_over_tcp, scrape)
RELAY = "tpctl.relay."
FAULTS: list[tuple[tuple[str, str, str], Callable[[Net], None]]] = [
    ((RELAY + "connections.tcp", "TcpRelay", "_on_accepted"), connection),
    ((RELAY + "connections.tcp", "TcpRelay", "_judge"), connection),
    ((RELAY + "connections.tcp", "TcpRelay", "_relay"), connection),
    ((RELAY + "connections.tcp", "TcpRelay", "_is_full"), connection),
    ((RELAY + "connections.tcp", "TcpRelay", "_write"), connection),
    ((RELAY + "connections.reception", "Guest", "accepted"), connection),
    ((RELAY + "connections.dialling", "Dialling", "start"), connection),
    ((RELAY + "connections.dialling", "Dialling", "_on_event"), connection),
    ((RELAY + "connections.dialling", "Dialling", "close"), connection),
    ((RELAY + "connections.connection", "Connection", "_on_client"), connection_with_urgent_data),
    ((RELAY + "connections.connection", "Connection", "_on_upstream"), connection_with_urgent_data),
    ((RELAY + "connections.quick", "QuickConnection", "_on_client_edge"), connection),
    ((RELAY + "connections.quick", "QuickConnection", "_on_upstream_edge"), connection),
    ((RELAY + "connections.quick", "QuickConnection", "_change_back"), connection_with_urgent_data),
    ((RELAY + "connections.connection", "Connection", "_arm"), connection),
    ((RELAY + "connections.pump", "Flow", "move"), connection),
    ((RELAY + "connections.pump", "Flow", "abandon"), connection),
    ((RELAY + "dns.forwarder", "DnsForwarder", "_on_queries"), quick_query),
    ((RELAY + "dns.forwarder", "DnsForwarder", "_take"), quick_query),
    ((RELAY + "dns.forwarder", "DnsForwarder", "_on_answer"), quick_query),
    ((RELAY + "dns.tcp", "DnsStreams", "_serve"), query_over_tcp),
    ((RELAY + "dns.tcp", "DnsStream", "_read"), query_over_tcp),
    ((RELAY + "dns.tcp", "DnsStream", "_on_answers"), query_over_tcp),
    ((RELAY + "dns.tcp_upstream", "TcpUpstream", "_on_event"), query_over_tcp),
    ((RELAY + "figures.metrics_server", "MetricsServer", "_on_accepted"), scrape),
    ((RELAY + "figures.metrics_server", "MetricsServer", "_hear"), scrape),
]


@contextlib.contextmanager
def faulty(net: Net, directory: Path, place: tuple[str, str, str], calls: range, *options: str) -> Iterator[Relay]:
    """A relay whose method fails at these calls, whose log names it once, and that ends orderly."""
    resolv_conf = dns_net.readable(directory, "resolv.conf", f"nameserver {PEER4}\n")
    prefix = (sys.executable, "-c", FAULT.format(place=place, calls=calls))
    given = ("--resolv-conf", str(resolv_conf), "--metrics", f"{METRICS[0]}:{METRICS[1]}", "--access-log", *options)
    try:
        with relay_net.relay(net, directory, *given, prefix=prefix) as running:
            yield running
    finally:
        resolv_conf.unlink()


@pytest.mark.parametrize(("place", "way"), FAULTS, ids=[f"{name}.{method}" for (_, name, method), _ in FAULTS])
def test_it_ends_what_it_was_about_and_nothing_else(
    net: Net, peers: None, tmp_path: Path, place: tuple[str, str, str], way: Callable[[Net], None]
) -> None:
    with faulty(net, tmp_path, place, range(3, 5)) as running:
        for _ in range(6):
            with contextlib.suppress(OSError, AssertionError, StopIteration):
                way(net)
        relay_net.until(lambda: failures(running))
        line = failures(running)[0]
        assert line["error"] == "RuntimeError: an injected fault"
        assert "exception" not in line, "a traceback without --debug"
        for each in WAYS:
            each(net)
        assert figure(net, "handler_failures_total") >= 1
        relay_net.until(lambda: active(net) == 0)


REFUSED_CALLS = (
    "epoll_ctl:error=ENOMEM",
    "epoll_wait:error=ENOMEM",
    "accept4:error=ENOBUFS",
    "recvmsg:error=ENOMEM",
    "sendmsg:error=ENOBUFS",
    "sendto:error=ENOBUFS",
    "connect:error=ENOBUFS",
    "socket:error=EMFILE",
    "setsockopt:error=ENOMEM",
    "getsockopt:error=ENOBUFS",
    "write:error=ENOSPC",
)


@pytest.mark.parametrize("fault", REFUSED_CALLS, ids=[fault.partition(":")[0] for fault in REFUSED_CALLS])
def test_a_kernel_without_room_is_survived(net: Net, peers: None, tmp_path: Path, fault: str) -> None:
    """Calls are refused while they are traced, and then no more."""
    resolv_conf = dns_net.readable(tmp_path, "resolv.conf", f"nameserver {PEER4}\n")
    given = ("--resolv-conf", str(resolv_conf), "--metrics", f"{METRICS[0]}:{METRICS[1]}", "--access-log")
    try:
        with relay_net.relay(net, tmp_path, *given) as running:
            call = fault.partition(":")[0]
            argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={fault}:when=1+2",
                    "-p", str(running.process.pid)]  # fmt: skip
            tracer = subprocess.Popen(argv)
            try:
                relay_net.until(lambda: relay_net.process_status(running.process.pid)["TracerPid"] != "0")
                for _ in range(4):
                    for way in (quickly_connected, quick_query, scrape):
                        with contextlib.suppress(OSError, AssertionError, StopIteration):
                            way(net)
            finally:
                tracer.terminate()
                tracer.wait()
            for each in WAYS:
                each(net)
    finally:
        resolv_conf.unlink()


def quickly_connected(net: Net) -> None:
    with net.connect(net.host, (PEER4, 7000)) as client:
        client.settimeout(2)
        client.sendall(b"ping")
        assert client.recv(4) == b"ping"


def failures(running: Relay) -> list[dict[str, object]]:
    return [line for line in running.lines() if line["event"].endswith("has failed, the relay continues")]


def active(net: Net) -> int:
    return figure(net, 'connections_active{listener="outbound"}')


def test_a_reload_that_fails_leaves_everything_as_it_was(net: Net, peers: None, tmp_path: Path) -> None:
    with faulty(net, tmp_path, (RELAY + "process.running", "Running", "renewed"), range(1, 2)) as running:
        running.process.send_signal(signal.SIGHUP)
        relay_net.until(lambda: figure(net, "handler_failures_total"))
        connection(net)
        running.process.send_signal(signal.SIGHUP)
        running.wait_for("the configuration was reloaded")


def test_a_signal_that_fails_does_not_swallow_the_others(net: Net, peers: None, tmp_path: Path) -> None:
    """SIGTERM still ends it."""
    with faulty(net, tmp_path, (RELAY + "process.supervisor", "Life", "_reload"), range(1, 100)) as running:
        running.process.send_signal(signal.SIGHUP)
        relay_net.until(lambda: figure(net, "handler_failures_total"))


def test_quiet_connections_are_still_ended(net: Net, peers: None, tmp_path: Path) -> None:
    """A periodic check fails for one connection: that one ends, and the others are looked at all the same."""
    text = 'timeouts: {idle: 2s}\nlisteners: [{listen: "*:1101", direction: inbound, upstream: "127.0.0.1:8080"}]\n'
    path = dns_net.readable(tmp_path, "relay.yaml", text)
    prefix = (
        sys.executable, "-c",
        FAULT.format(place=(RELAY + "connections.connection", "Connection", "check_quiet"), calls=range(1, 3)),
    )  # fmt: skip
    try:
        with relay_net.relay(net, tmp_path, "--config", str(path), "--access-log", prefix=prefix) as running:
            clients = [net.connect(net.host, ("127.0.0.1", 1101)) for _ in range(5)]
            for client in clients:
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
                client.close()
            running.wait_for("connection", reason="an error of the relay's own")
            running.wait_for("connection", reason="idle for too long")
    finally:
        path.unlink()
