"""How the relay starts and ends."""

from __future__ import annotations

import os
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, Net, Relay, Server
from tests.netns.relay.test_operation import scrape

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(passthrough6=False) as network:
        yield network


@pytest.fixture(scope="module")
def echo_server(net: Net) -> Iterator[Server]:
    server = Server(net.listen(net.peer, (PEER4, 7000)), relay_net.echo)
    yield server
    server.close()


def talk(client: socket.socket, message: bytes = b"ping") -> None:
    client.sendall(message)
    assert client.recv(100) == message


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(net: Net, tmp_path: Path, echo_server: Server, workers: str, number: int) -> None:
    running = Relay(net, tmp_path, "--workers", workers)
    try:
        running.wait_for("ready")
        with net.connect(net.host, (PEER4, 7000)) as client:
            talk(client)
            running.process.send_signal(number)
            running.wait_for("draining")
            # Each of them has sockets of its own.
            relay_net.until(lambda: [line["event"] for line in running.lines()].count("draining") == int(workers))
            with pytest.raises(ConnectionRefusedError):
                net.connect(net.host, (PEER4, 7000))
            talk(client)
            assert running.process.poll() is None
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert running.exit_code() == 0
    finally:
        running.stop(signal.SIGKILL)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_drain_timeout_ends_what_is_left(net: Net, tmp_path: Path, echo_server: Server, workers: str) -> None:
    running = Relay(net, tmp_path, "--workers", workers, "--drain-timeout", "0.5")
    try:
        running.wait_for("ready")
        with net.connect(net.host, (PEER4, 7000)) as client:
            talk(client)
            started = time.monotonic()
            assert running.stop() == 0
            assert time.monotonic() - started > 0.4
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    finally:
        running.stop(signal.SIGKILL)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_ends_at_once(net: Net, tmp_path: Path, echo_server: Server, workers: str) -> None:
    running = Relay(net, tmp_path, "--workers", workers)
    try:
        running.wait_for("ready")
        with net.connect(net.host, (PEER4, 7000)) as client:
            talk(client)
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            assert running.stop() == 0
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    finally:
        running.stop(signal.SIGKILL)


def test_workers_share_the_connections(net: Net, tmp_path: Path, echo_server: Server) -> None:
    with relay_net.relay(net, tmp_path, "--workers", "2") as running:
        clients = [net.connect(net.host, (PEER4, 7000)) for _ in range(40)]
        for client in clients:
            talk(client)
        descriptors = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in running.workers()]
        for client in clients:
            client.close()
    assert len(descriptors) == 2
    assert min(descriptors) > 15, descriptors


def test_a_worker_that_dies_is_replaced(net: Net, tmp_path: Path, echo_server: Server) -> None:
    """The others and their connections go on, and it is as if the dead one's had never been."""
    with relay_net.relay(net, tmp_path, "--workers", "3", "--metrics", "127.0.0.1:9902") as running:
        clients = [net.connect(net.host, (PEER4, 7000)) for _ in range(30)]
        for client in clients:
            talk(client)
        victim = running.workers()[1]
        os.kill(victim, signal.SIGKILL)
        running.wait_for("a worker has died and is replaced", pid=victim, status=-signal.SIGKILL)
        relay_net.until(lambda: len(running.workers()) == 3)
        alive = [client for client in clients if is_alive(client)]
        assert 0 < len(alive) < len(clients)
        more = [net.connect(net.host, (PEER4, 7000)) for _ in range(30)]
        for client in more:
            talk(client)
        shown = scrape(net, 9902)
        assert shown['connections_active{listener="outbound"}'] == len(alive) + len(more)
        assert shown['connections_accepted_total{listener="outbound"}'] == 60
        for client in (*clients, *more):
            client.close()


def is_alive(client: socket.socket) -> bool:
    try:
        talk(client)
    except (OSError, AssertionError):
        return False
    return True


def test_a_worker_that_hangs_is_replaced(net: Net, tmp_path: Path, echo_server: Server) -> None:
    with relay_net.relay(net, tmp_path, "--workers", "2") as running:
        relay_net.until(running.have_begun)  # one that has not is waited for
        victim = running.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        running.wait_for("a worker hangs and is killed", pid=victim)
        relay_net.until(lambda: len(running.workers()) == 2 and victim not in running.workers())
        for _ in range(20):
            with net.connect(net.host, (PEER4, 7000)) as client:
                talk(client)


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_worker_that_hangs_does_not_keep_the_relay_from_its_end(net: Net, tmp_path: Path, has_begun: bool) -> None:
    running = Relay(net, tmp_path, "--workers", "2")
    try:
        running.wait_for("ready")
        relay_net.until(running.have_begun)
        victim, other = running.workers()
        if not has_begun:  # so its successor, at its very first
            os.kill(victim, signal.SIGKILL)
            while not (new := set(running.workers()) - {victim, other}):
                assert running.process.poll() is None
            victim = new.pop()
        os.kill(victim, signal.SIGSTOP)
        assert running.stop() == 1  # not all have ended as they should
        running.wait_for("a worker hangs and is killed", pid=victim)
    finally:
        running.stop(signal.SIGKILL)


def test_a_relay_ends_while_all_of_its_workers_are_being_replaced(net: Net, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path, "--workers", "2") as running:
        for seconds in (0.0, 1.0, 2.0, 4.0):
            relay_net.until(lambda: len(running.workers()) == 2)
            for pid in running.workers():
                os.kill(pid, signal.SIGKILL)
                running.wait_for("a worker has died and is replaced", pid=pid, seconds=seconds)
        running.process.send_signal(signal.SIGTERM)
        assert running.exit_code() == 0


def test_workers_end_with_a_supervisor_that_is_killed(net: Net, tmp_path: Path) -> None:
    running = Relay(net, tmp_path, "--workers", "2")
    running.wait_for("ready")
    workers = running.workers()
    running.stop(signal.SIGKILL)
    relay_net.until(lambda: not any(relay_net.is_running(pid) for pid in workers))


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("kind", "port"), [(socket.SOCK_STREAM, 15001), (socket.SOCK_STREAM, 15006), (socket.SOCK_DGRAM, 15053)]
)
def test_a_port_in_use_is_one_error_that_names_it(
    net: Net, tmp_path: Path, workers: str, kind: socket.SocketKind, port: int
) -> None:
    with net.inside(net.host):
        taken = socket.socket(socket.AF_INET, kind)
    with taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("0.0.0.0", port))
        if kind is socket.SOCK_STREAM:
            taken.listen()
        running = Relay(net, tmp_path, "--workers", workers)
        assert running.exit_code() == 2
    log = next(tmp_path.glob("relay-*.log")).read_text()
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, log
    assert f"port {port} " in errors[0]
    assert "in use" in errors[0]


def test_a_second_relay_does_not_share_the_ports_of_the_first(net: Net, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path, "--workers", "2"):
        assert Relay(net, tmp_path, "--workers", "2").exit_code() == 2


def test_it_becomes_the_user_before_it_opens_a_socket(net: Net, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path) as running:
        status = Path(f"/proc/{running.process.pid}/status").read_text().splitlines()
        assert "Uid:\t65534\t65534\t65534\t65534" in status
        listening = net.on_host("ss", "-Hlnte", "sport = :15006")
        assert "uid:65534" in listening


def test_running_as_root_is_pointed_out(net: Net, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path, user=None) as running:
        running.wait_for("running as root")


def test_an_unknown_user_is_bad_input(net: Net, tmp_path: Path) -> None:
    assert Relay(net, tmp_path, user="no-such-user").exit_code() == 2


def test_without_the_passthrough_address_the_application_is_reached_on_loopback(net: Net, tmp_path: Path) -> None:
    listener = net.listen(net.host, ("::", 8081))
    server = Server(listener, relay_net.say_who("application"))
    try:
        with relay_net.relay(net, tmp_path) as running, net.connect(net.peer, (HOST6, 8081)) as client:
            assert relay_net.read_all(client) == b'["application", "::1", "::1", 8081]'
            assert running.wait_for("an address that the relay dials")["address"] == "::6"
    finally:
        server.close()


def test_a_connection_that_nobody_redirected_is_dialled_only_if_it_is_not_the_relay(net: Net, tmp_path: Path) -> None:
    """Without any rule the accepted socket's own address is the original destination."""
    with (
        relay_net.network(redirect=False) as bare,
        relay_net.relay(bare, tmp_path),
        pytest.raises(ConnectionResetError),
        bare.connect(bare.peer, (HOST4, 15006)) as client,
    ):
        client.recv(1)


def test_it_listens_on_ipv4_alone_when_told_to(net: Net, tmp_path: Path, echo_server: Server) -> None:
    with relay_net.relay(net, tmp_path, "--bind-address", "0.0.0.0"):
        with net.connect(net.host, (PEER4, 7000)) as client:
            talk(client)
        with pytest.raises(ConnectionRefusedError):
            net.connect(net.host, ("::1", 15001))


def test_it_serves_ipv4_where_ipv6_is_disabled(tmp_path: Path) -> None:
    with relay_net.network(passthrough6=False) as network:
        network.on_host("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1")
        server = Server(network.listen(network.peer, (PEER4, 7000)), relay_net.echo)
        try:
            with relay_net.relay(network, tmp_path), network.connect(network.host, (PEER4, 7000)) as client:
                talk(client)
        finally:
            server.close()


def test_running_out_of_descriptors_is_survived_without_spinning(net: Net, tmp_path: Path, echo_server: Server) -> None:
    with relay_net.relay(net, tmp_path, prefix=("prlimit", "--nofile=20:20")) as running:
        clients = [net.connect(net.host, (PEER4, 7000)) for _ in range(12)]
        running.wait_for("out of resources")
        before = cpu_seconds(running.process.pid)
        time.sleep(0.5)
        assert cpu_seconds(running.process.pid) - before < 0.1
        for client in clients:
            client.close()
        relay_net.until(lambda: is_served(net))  # who comes before the others are forgotten is accepted, and reset


def is_served(net: Net) -> bool:
    try:
        with net.connect(net.host, (PEER4, 7000)) as client:
            talk(client)
    except ConnectionError:
        return False
    return True


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        Path(directory).chmod(0o755)
        manager.bind(f"{directory}/notify")
        Path(f"{directory}/notify").chmod(0o666)
        manager.settimeout(relay_net.TIMEOUT)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
        with relay_net.relay(net, tmp_path, "--workers", workers):
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_watchdog_hears_of_a_relay_that_lives_and_not_of_one_that_hangs(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        Path(directory).chmod(0o755)
        manager.bind(f"{directory}/notify")
        Path(f"{directory}/notify").chmod(0o666)
        manager.settimeout(relay_net.TIMEOUT)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        begin = time.monotonic()
        with relay_net.relay(net, tmp_path, "--workers", workers) as running:
            assert manager.recv(100) == b"READY=1"
            assert [manager.recv(100) for _ in range(11)] == [b"WATCHDOG=1"] * 11
            assert time.monotonic() - begin > 1.5, "the first one comes at once, and the others after 0.2 s each"
            running.process.send_signal(signal.SIGSTOP)
            manager.settimeout(0.6)
            try:
                with pytest.raises(TimeoutError):  # when those that wait have been read
                    [manager.recv(100) for _ in range(100)]
            finally:
                running.process.send_signal(signal.SIGCONT)


def test_a_client_that_gives_up_while_its_server_is_dialled_frees_the_connection(net: Net, tmp_path: Path) -> None:
    blackhole = ("INPUT", "-p", "tcp", "--dport", "7001", "-j", "DROP")
    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}", "iptables", "-w")
    relay_net.run(*on_peer, "-A", *blackhole)
    try:
        with relay_net.relay(net, tmp_path, "--access-log") as running:
            client = net.connect(net.host, (PEER4, 7001))
            relay_net.until(lambda: net.on_host("ss", "-Htn", "state", "syn-sent", "dport = :7001"))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            line = running.wait_for("connection")
            assert line["error"] == "Connection reset by peer"
            assert line["destination"] == f"{PEER4}:7001"
    finally:
        relay_net.run(*on_peer, "-D", *blackhole)
