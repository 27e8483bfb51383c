"""Restarts under load: the listening sockets go from process to process, and nobody is refused or reset."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, PEER4, Net, Relay
from tests.netns.relay.test_listeners import serving

pytestmark = pytest.mark.root
RESTARTS = 20
CLIENTS = 8
LONG = 60.0
TEXT = """
workers: {workers}
drain_timeout: 300s
metrics: 127.0.0.1:9902
listeners:
  - {{listen: "*:1101{reuseport}", direction: outbound, upstream: "{peer}:7001"}}
  - {{listen: "127.0.0.1:1102", direction: outbound, upstream: "{peer}:7001"}}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


def patient_echo(client: socket.socket, peer: object) -> None:
    """For a connection that outlives twenty processes."""
    client.settimeout(300)
    relay_net.echo(client, peer)


class Load:
    """Clients that connect, say something, read it back and hang up, over and over."""

    def __init__(self, net: Net, port: int) -> None:
        self.results: collections.Counter[str] = collections.Counter()
        self._net = net
        self._address = (HOST4, port)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        message = os.urandom(3000)
        with self._net.inside(self._net.host):
            while not self._over.is_set():
                try:
                    with socket.create_connection(self._address, timeout=LONG) as client:
                        client.sendall(message)
                        client.shutdown(socket.SHUT_WR)
                        self.results["right" if relay_net.read_all(client) == message else "wrong"] += 1
                except OSError as error:
                    self.results[type(error).__name__] += 1


def serving_pid(running: Relay, count: int) -> int:
    """The pid of the `count`th process that has served."""
    end = time.monotonic() + LONG
    while len(pids := [line["pid"] for line in running.lines() if line["event"] == "ready"]) < count:
        assert time.monotonic() < end, running.log_text()[-3000:]
        time.sleep(0.02)
    return int(pids[count - 1])


@contextlib.contextmanager
def ended_at_last(running: Relay, restarts: int) -> Iterator[None]:
    """Successors are no children of the test."""
    try:
        yield
    finally:
        pid = serving_pid(running, restarts + 1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        relay_net.until(lambda: not relay_net.is_running(pid))
        running.stop(signal.SIGQUIT)


@pytest.mark.parametrize(("workers", "reuseport"), [(1, ""), (2, " reuseport")])
def test_restarts_under_load_lose_nothing(net: Net, directory: Path, workers: int, reuseport: str) -> None:
    path = directory / "relay.yaml"
    path.write_text(TEXT.format(workers=workers, reuseport=reuseport, peer=PEER4))
    running = Relay(net, directory, "--config", str(path))
    with serving(net, net.peer, (PEER4, 7001), patient_echo), ended_at_last(running, RESTARTS):
        serving_pid(running, 1)
        with net.connect(net.host, (HOST4, 1101)) as lasting, Load(net, 1101) as load:
            lasting.sendall(b"first")
            assert lasting.recv(5) == b"first"
            for number in range(1, RESTARTS + 1):
                os.kill(serving_pid(running, number), signal.SIGUSR2)
                serving_pid(running, number + 1)
            time.sleep(0.3)
            lasting.sendall(b"still")
            assert lasting.recv(5) == b"still"  # the first process serves it, twenty later
        assert running.exit_code() == 0
    assert load.results.keys() == {"right"}, load.results
    assert load.results["right"] > RESTARTS
    assert not [line for line in running.lines() if line["event"].startswith("a socket that was handed over")]


def test_a_successor_that_does_not_start_changes_nothing(net: Net, directory: Path) -> None:
    path = directory / "relay.yaml"
    text = TEXT.format(workers=2, reuseport="", peer=PEER4)
    path.write_text(text)
    running = Relay(net, directory, "--config", str(path))
    with serving(net, net.peer, (PEER4, 7001), patient_echo), ended_at_last(running, 1):
        pid = serving_pid(running, 1)
        path.write_text(text.replace("outbound", "sideways"))
        with Load(net, 1101) as load:
            os.kill(pid, signal.SIGUSR2)
            running.wait_for("the restart has failed, this process continues")
            path.write_text(text.replace("workers: 2", "workers: 3"))  # which takes a restart
            os.kill(pid, signal.SIGUSR2)
            successor = serving_pid(running, 2)
            time.sleep(0.3)
        children = Path(f"/proc/{successor}/task/{successor}/children").read_text().split()
        assert len(children) == 3
        assert load.results.keys() == {"right"}


def test_systemd_learns_who_the_successor_is(net: Net, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"@tpctl-restart-{os.getpid()}")
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    path = directory / "relay.yaml"
    path.write_text(TEXT.format(workers=1, reuseport="", peer=PEER4))
    with net.inside(net.host), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0tpctl-restart-{os.getpid()}")
        manager.settimeout(relay_net.TIMEOUT)
        running = Relay(net, directory, "--config", str(path))
        with ended_at_last(running, 1):
            os.kill(serving_pid(running, 1), signal.SIGUSR2)
            successor = serving_pid(running, 2)
            running.exit_code()
            said = [manager.recv(1000) for _ in range(5)]
    assert said[:2] == [b"READY=1", b"WATCHDOG=1"]
    assert sorted(said[2:]) == sorted([b"READY=1", f"MAINPID={successor}".encode(), b"WATCHDOG=1"])
    assert b"STOPPING=1" not in said


def test_systemd_keeps_the_sockets_and_gives_them_back(
    net: Net, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash and a restart with the store of descriptors in between: clients wait, none is refused."""
    path = directory / "relay.yaml"
    path.write_text(TEXT.format(workers=2, reuseport=" reuseport", peer=PEER4))
    monkeypatch.setenv("NOTIFY_SOCKET", f"@tpctl-store-{os.getpid()}")
    monkeypatch.setenv("FDSTORE", "512")
    kept: list[tuple[str, socket.socket]] = []
    with net.inside(net.host), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0tpctl-store-{os.getpid()}")
        manager.settimeout(relay_net.TIMEOUT)
        running = Relay(net, directory, "--config", str(path))
        while (received := socket.recv_fds(manager, 1000, 10))[0] != b"READY=1":
            name = received[0].decode().partition("FDNAME=")[2]
            kept += [(name, socket.socket(fileno=descriptor)) for descriptor in received[1]]
        path.write_text(path.read_text().replace("127.0.0.1:1102", "127.0.0.1:1103"))
        running.process.send_signal(signal.SIGHUP)
        said = b"".join(manager.recv(1000) + b"\n" for _ in range(4)).decode()
    assert [name for name, _sock in kept] == [
        "outbound-1101.1.0.0.0.0_1101", "outbound-1101.1.0.0.0.0_1101", "outbound-1102.1.127.0.0.1_1102",
        "metrics.1.127.0.0.1_9902",
    ]  # fmt: skip
    assert "FDSTOREREMOVE=1\nFDNAME=outbound-1102.1.127.0.0.1_1102" in said
    assert "FDSTORE=1\nFDNAME=outbound-1103.1.127.0.0.1_1103" in said
    workers = running.workers()
    running.stop(signal.SIGKILL)
    relay_net.until(lambda: not any(relay_net.is_running(pid) for pid in workers))  # they serve until they see it
    with serving(net, net.peer, (PEER4, 7001), patient_echo), net.connect(net.host, (HOST4, 1101)) as waiting:
        waiting.sendall(b"early")
        again = restarted(net, directory, path, kept)
        try:
            assert waiting.recv(5) == b"early"
            assert not [line for line in again.lines() if "belongs to no listener" in line["event"] and
                        line["address"] != "127.0.0.1:1102"]  # fmt: skip
            assert len(net.on_host("ss", "-Hltn", "sport = :1101").splitlines()) == 2
        finally:
            assert again.stop(signal.SIGQUIT) == 0
            for _name, sock in kept:
                sock.close()


GIVE = """
import os, sys
given, arguments = sys.argv[1].split(","), sys.argv[2:]
for at, number in enumerate(given):
    os.dup2(int(number), 200 + at)
for at in range(len(given)):
    os.dup2(200 + at, 3 + at)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(arguments[0], arguments)
"""


def restarted(net: Net, directory: Path, path: Path, kept: list[tuple[str, socket.socket]]) -> Relay:
    """A relay that gets these sockets as systemd would give them."""
    for _name, sock in kept:
        sock.set_inheritable(True)
    os.environ |= {"LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(name for name, _sock in kept)}
    numbers = ",".join(str(sock.fileno()) for _name, sock in kept)
    try:
        running = Relay(
            net, directory, "--config", str(path), prefix=(sys.executable, "-c", GIVE, numbers), close_fds=False
        )
    finally:
        del os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"]
    running.wait_for("ready")
    return running
