"""Reloads and restarts that change what is hard to change, and workers that do not do as they are told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki
from tests.netns.relay.net import HOST4, HOST6, PEER4, Net, Relay, is_running, process_status, until
from tests.netns.relay.test_listeners import configured, serving, written
from tests.netns.relay.test_operation import LISTENER, rewrite, said, say, scrape

pytestmark = pytest.mark.root
RELOADED = "the configuration was reloaded"
REFUSED = "the configuration is invalid, the old one stays"
LONG = 60.0
TO_THE_PEER = f'direction: outbound, upstream: "{PEER4}:7001"'


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


def listener(options: str, more: str = TO_THE_PEER) -> str:
    return f'  - {{listen: "{options}", {more}}}\n'


def listeners(*lines: str, more: str = "") -> str:
    return f"{more}\nlisteners:\n{''.join(lines)}"


def problems_of_last_reload(running: Relay) -> str:
    return " ".join([line for line in running.lines() if line["event"] == REFUSED][-1]["problems"])


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that hangs while the block lasts. It may be no child of this one."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: process_status(pid)["State"][0] in "TZ")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def succeeded(running: Relay) -> Iterator[int]:
    """The pid of a successor, which is ended with the block."""
    running.process.send_signal(signal.SIGUSR2)
    successor = int(running.wait_for("handed over")["successor"])
    try:
        assert running.process.wait(LONG) == 0
        yield successor
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(successor, signal.SIGQUIT)
        until(lambda: not is_running(successor))


def keepalive_timer(net: Net) -> str:
    """How the kernel shows the timer of a new connection, while all other ones are closed."""
    with net.connect(net.peer, (HOST4, 1101)) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        asked = ("ss", "-Htno", "state", "established", "sport = :1101", f"dport = :{client.getsockname()[1]}")
        until(lambda: "timer:(on" not in net.on_host(*asked))  # while the client has not acknowledged
        return net.on_host(*asked).partition("timer:(")[2]


def test_keepalive_follows_a_reload(net: Net, directory: Path) -> None:
    def text(option: str) -> str:
        return listeners(listener(f"*:1101 {option}"))

    with (
        configured(net, directory, text("so_keepalive=5m:20s:3")) as running,
        serving(net, net.peer, (PEER4, 7001), relay_net.echo),
    ):
        assert keepalive_timer(net).startswith(("keepalive,4min", "keepalive,5min"))
        rewrite(running, directory, text("so_keepalive=on"))
        assert keepalive_timer(net).startswith(("keepalive,119min", "keepalive,120min"))
        rewrite(running, directory, text("so_keepalive=9m::"))
        rewrite(running, directory, text(""))
        assert keepalive_timer(net) == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_socket_serves_something_else_only_after_a_restart(net: Net, directory: Path, workers: int) -> None:
    """Connections, DNS and the metrics are served by different parts of a worker."""
    begin = f"workers: {workers}"
    first = listeners(
        listener("127.0.0.1:1101"),
        listener("127.0.0.1:1102", "direction: dns"),
        more=f"{begin}\nmetrics: 127.0.0.1:1103",
    )
    second = listeners(listener("127.0.0.1:1102"), listener("127.0.0.1:1103"), more=f"{begin}\nmetrics: 127.0.0.1:1101")
    with configured(net, directory, first) as running, serving(net, net.peer, (PEER4, 7001), say(b"one")):
        rewrite(running, directory, second, REFUSED)
        problems = problems_of_last_reload(running)
        assert "127.0.0.1:1102 serves dns, and connections instead: that takes effect with a restart" in problems
        assert "127.0.0.1:1101 serves connections, and metrics instead" in problems
        assert said_here(net, 1101) == b"one"
        assert scrape(net, 1103)["workers"] == workers
        with succeeded(running):
            assert said_here(net, 1102) == said_here(net, 1103) == b"one"
            assert scrape(net, 1101)["workers"] == workers


def said_here(net: Net, port: int) -> bytes:
    with net.connect(net.host, ("127.0.0.1", port)) as client:
        return relay_net.read_all(client)


def test_a_socket_stays_as_it_was_opened_and_that_is_said(net: Net, directory: Path) -> None:
    with (
        configured(net, directory, listeners(listener("[::]:1101 ipv6only=off"))) as running,
        serving(net, net.peer, (PEER4, 7001), say(b"one")),
    ):
        rewrite(running, directory, listeners(listener("[::]:1101 ipv6only=on")), REFUSED)
        assert "ipv6only of [::]:1101 has changed, which takes effect when the relay is stopped and started again" in (
            problems_of_last_reload(running)
        )
        with succeeded(running):
            warned = running.wait_for("a socket that was handed over is not what its listener asks for")
            assert (warned["listener"], warned["ipv6only"]) == ("outbound-1101", "off")
            assert said(net, 1101) == b"one"


def test_a_restart_makes_a_socket_transparent_or_says_why_not(net: Net, directory: Path) -> None:
    text = listeners(listener("[::]:1101"))
    with configured(net, directory, text) as running:
        written(directory, text.replace("1101", "1101 transparent"))
        running.process.send_signal(signal.SIGUSR2)
        running.wait_for("the restart has failed, this process continues")
        assert "transparent needs the capability CAP_NET_RAW" in running.log_text()
    # As root, which keeps its capabilities.
    path = written(directory, text)
    with (
        relay_net.relay(net, directory, "--config", str(path), user=None) as running,
        serving(net, net.peer, (PEER4, 7001), say(b"one")),
    ):
        written(directory, text.replace("1101", "1101 transparent"))
        with succeeded(running):
            relay_net.run("ip", "-n", net.host, "-6", "route", "add", "local", "fd77::/64", "dev", "lo")
            with net.connect(net.host, ("fd77::1", 1101)) as client:
                assert relay_net.read_all(client) == b"one"


def test_who_may_not_dial_from_addresses_of_clients_says_so(net: Net, directory: Path) -> None:
    text = listeners(listener("*:1101"))
    asking = listeners(listener("*:1101", f"{TO_THE_PEER}, source: client"))
    problem = "source: client of the outbound-1101 listener needs the capability CAP_NET_RAW"
    with configured(net, directory, text) as running, serving(net, net.peer, (PEER4, 7001), say(b"one")):
        rewrite(running, directory, asking, REFUSED)
        assert problem in problems_of_last_reload(running)
        assert said(net, 1101) == b"one"
    as_nobody = ("setpriv", "--reuid=65534", "--clear-groups")
    running = Relay(net, directory, "--config", str(written(directory, asking)), user=None, prefix=as_nobody)
    assert running.exit_code() == 2
    assert problem in running.log_text()


def successor_of(running: Relay, before: set[int]) -> int:
    """The successor that is being started, or that has been faster than this test. `before` are the workers."""
    found: set[int] = set()

    def is_there() -> bool:
        found.update(children(running.process.pid) - before)
        found.update(line["successor"] for line in running.lines() if line["event"] == "handed over")
        return bool(found)

    until(is_there)
    (successor,) = found
    return successor


@pytest.mark.parametrize("workers", [1, 2])
def test_who_ends_the_relay_ends_the_successor_that_is_being_started(net: Net, directory: Path, workers: int) -> None:
    text = listeners(listener("127.0.0.1:1101"), more=f"workers: {workers}")
    for _ in range(10):
        with configured(net, directory, text) as running:
            before = children(running.process.pid)
            running.process.send_signal(signal.SIGUSR2)
            successor = successor_of(running, before)
            with stopped(successor):
                running.process.send_signal(signal.SIGTERM)
                assert running.process.wait(LONG) == 0
        early = "handed over" not in [line["event"] for line in running.lines()]
        if not early:  # it was faster than this test
            os.kill(successor, signal.SIGTERM)
        until(lambda: not is_running(successor))  # noqa: B023
        with pytest.raises(ConnectionRefusedError):
            net.connect(net.host, ("127.0.0.1", 1101))
        if early:
            return
    pytest.fail("no restart was caught while it was under way")


def hangs(running: Relay) -> int:
    return [line["event"] for line in running.lines()].count("a worker hangs, so the watchdog is not notified")


def test_the_watchdog_hears_nothing_while_a_worker_hangs(
    net: Net, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"tpctl-watchdog-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with net.inside(net.host), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(LONG)
        path = written(directory, listeners(listener("127.0.0.1:1101"), more="workers: 2"))
        with relay_net.relay(net, directory, "--config", str(path)) as running:
            assert [manager.recv(100) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
            with stopped(min(children(running.process.pid))):
                before = hangs(running)  # a busy machine may have made it seem so before
                until(lambda: hangs(running) > before + 1)
                manager.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while manager.recv(100):
                        pass
                manager.settimeout(1.5)  # the supervisor would have said so five times
                with pytest.raises(TimeoutError):
                    manager.recv(100)
            manager.settimeout(LONG)
            assert manager.recv(100) == b"WATCHDOG=1"


def test_a_worker_that_could_not_follow_a_reload_follows_the_next_one(net: Net, directory: Path) -> None:
    """Its certificate went away between the moments when the supervisor and the worker read it."""
    certificate, key = Pki(directory).server
    tls = f'direction: inbound, upstream: "127.0.0.1:7001", ssl: {{certificate: {certificate}, certificate_key: {key}}}'
    first = listeners(listener("*:1443 ssl", tls), listener("*:1102"), more="workers: 2")
    second = first + listener("*:1101")
    with configured(net, directory, first) as running, serving(net, net.peer, (PEER4, 7001), say(b"one")):
        quick, slow = sorted(children(running.process.pid))
        with stopped(quick):
            assert said(net, 1102) == b"one"  # so the slow one serves
        with stopped(slow):
            written(directory, second)
            running.process.send_signal(signal.SIGHUP)
            until(lambda: net.on_host("ss", "-Hltn", "sport = :1101"))
            assert said(net, 1101) == b"one"  # so the quick one has it
            good = certificate.read_bytes()
            certificate.write_bytes(b"being written")
            assert RELOADED not in [line["event"] for line in running.lines()], "not every worker has it"
        assert running.wait_for("a worker keeps its old configuration")["pid"] == slow
        running.wait_for(RELOADED)
        certificate.write_bytes(good)
        rewrite(running, directory, second + "drain_timeout: 1s\n")
        with stopped(quick):
            assert said(net, 1101) == b"one"


def test_timeouts_of_a_reload_are_noticed_at_once_and_older_connections_keep_theirs(net: Net, directory: Path) -> None:
    """Not when it would have been looked for those of before."""

    def text(idle: str) -> str:
        return listeners(listener("*:1101", f"{TO_THE_PEER}, timeouts: {{idle: {idle}}}"))

    def hello() -> socket.socket:
        client = net.connect(net.peer, (HOST4, 1101))
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        return client

    with (
        configured(net, directory, text("1h")) as running,
        serving(net, net.peer, (PEER4, 7001), relay_net.echo),
        hello() as patient,
    ):
        rewrite(running, directory, text("2s"))
        with hello() as hasty, hello() as kept:
            rewrite(running, directory, text("1h"))
            for client in (hasty, kept):
                client.settimeout(LONG)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        patient.sendall(b"y")
        assert patient.recv(1) == b"y"


def test_sources_of_both_families_are_served_by_what_is_left(net: Net, directory: Path) -> None:
    """A listener is taken away, renamed and limited while its connections go on."""
    begin = "limits: {connections: 3}"
    first = listeners(listener("[::]:1101 ipv6only=off"), more=begin)
    renamed = LISTENER.format(port=1102, to=7001, name="other", more="", peer=PEER4)
    with (
        configured(net, directory, first) as running,
        serving(net, net.peer, (PEER4, 7001), relay_net.echo),
        net.connect(net.peer, (HOST4, 1101)) as v4,
        net.connect(net.peer, (HOST6, 1101)) as v6,
    ):
        rewrite(running, directory, listeners(renamed, more=begin))
        for client in (v4, v6):
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        with net.connect(net.peer, (HOST4, 1102)) as third, net.connect(net.peer, (HOST4, 1102)) as waits:
            third.sendall(b"x")
            assert third.recv(1) == b"x"
            waits.sendall(b"x")
            waits.settimeout(0.5)
            with pytest.raises(TimeoutError):
                waits.recv(1)
            v4.close()
            waits.settimeout(LONG)
            assert waits.recv(1) == b"x"
