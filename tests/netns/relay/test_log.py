"""A log that nobody reads, or that cannot be written, stops neither traffic nor anything else."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hidden import anybodys_python
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER4, RELAY_USER, Net, Server

pytestmark = pytest.mark.root
CONNECTIONS = 300
"""Each is a line of some 300 bytes: far more than the pipe, the socket or the terminal takes."""
DROPPED = "log lines were dropped: nobody read them, or they could not be written"
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_SET_STRING, _CREATE = 1, 6
"""asm-generic/unistd.h, linux/mount.h."""
METRICS = ("127.0.0.1", 9902)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def server(net: Net) -> Iterator[Server]:
    running = Server(net.listen(net.peer, (PEER4, 7000)), relay_net.echo)
    yield running
    running.close()


@contextlib.contextmanager
def relay(net: Net, stderr: int, *options: str, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """One whose log goes to a descriptor, and that has to end orderly."""
    # A successor is executed by the relay's user, who may not be allowed to look into this checkout: the relay would
    # go on, and could not say why.
    python, environment = anybodys_python()
    argv = [python, "-m", "tpctl.cli.main", "relay", "--user", RELAY_USER, "--drain-timeout", "0.2"]
    argv += ["--access-log", "--log-format", "json", "--metrics", f"{METRICS[0]}:{METRICS[1]}", *options]
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{net.host}", *prefix, *argv], stderr=stderr, env=environment
    )
    try:
        relay_net.until(lambda: is_listening(net))
        yield process
        process.terminate()
        assert process.wait(relay_net.PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def is_listening(net: Net) -> bool:
    with contextlib.suppress(OSError), net.connect(net.host, METRICS):
        return True
    return False


def served(net: Net, count: int = CONNECTIONS) -> None:
    for _ in range(count):
        with net.connect(net.host, (PEER4, 7000)) as client:
            client.sendall(b"ping")
            assert client.recv(4) == b"ping"


def figure(net: Net, name: str) -> int:
    with net.connect(net.host, METRICS) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = relay_net.read_all(scraper).decode()
    return next(int(line.split()[-1]) for line in text.splitlines() if line.startswith(f"tpctl_relay_{name} "))


@contextlib.contextmanager
def full() -> Iterator[int]:
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def stalled_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield writer
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK, "others who share the pipe would be surprised"
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def stalled_socket() -> Iterator[int]:
    """As journald's."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield writer.fileno()


@contextlib.contextmanager
def stopped_terminal() -> Iterator[int]:
    """Somebody has pressed Ctrl-S."""
    master, terminal = os.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    yield terminal
    termios.tcflow(terminal, termios.TCOON)
    os.close(master)
    os.close(terminal)


LOGS = (full, pipe_without_reader, stalled_pipe, stalled_socket, stopped_terminal)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("log", LOGS, ids=[log.__name__ for log in LOGS])
def test_traffic_and_signals_go_on(
    net: Net, server: Server, log: Callable[[], contextlib.AbstractContextManager[int]], workers: str
) -> None:
    with log() as stderr, relay(net, stderr, "--workers", workers) as running:
        served(net)
        running.send_signal(signal.SIGHUP)
        relay_net.until(lambda: reloads(net))
        served(net, 20)
        with contextlib.suppress(ConnectionResetError), net.connect(net.host, (PEER4, 7001)):
            pass  # nobody serves there: a line of another kind
        if log in (full, pipe_without_reader):
            relay_net.until(lambda: figure(net, "log_lines_dropped_total") >= CONNECTIONS)


def reloads(net: Net) -> bool:
    with net.connect(net.host, METRICS) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b'configuration_reloads_total{result="used"} 1' in relay_net.read_all(scraper)


def test_bad_input_has_its_exit_code_whoever_hears_of_it() -> None:
    with full() as stderr:
        argv = [sys.executable, "-m", "tpctl.cli.main", "relay", "--inbound-port", "15001"]
        assert subprocess.run(argv, stderr=stderr, check=False, timeout=relay_net.PATIENCE).returncode == 2


def test_a_closed_stderr_is_no_descriptor_of_a_client(net: Net, server: Server) -> None:
    with full() as stderr, relay(net, stderr, prefix=("sh", "-c", 'exec "$@" 2>&-', "sh")):
        served(net, 20)


@contextlib.contextmanager
def small_disk() -> Iterator[int]:
    """The root of a file system of 32 KiB that is mounted nowhere (fsopen(2), fsmount(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, b"tmpfs", 0)
    if context < 0:
        pytest.skip(f"fsopen: {os.strerror(ctypes.get_errno())}")
    assert libc.syscall(_FSCONFIG, context, _SET_STRING, b"size", b"32k", 0) == 0
    assert libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0) == 0
    root = libc.syscall(_FSMOUNT, context, 0, 0)
    assert root >= 0
    yield root
    os.close(root)
    os.close(context)


def fill_disk(root: int) -> None:
    ballast = os.open("ballast", os.O_CREAT | os.O_WRONLY, dir_fd=root)
    with contextlib.suppress(OSError):
        while os.write(ballast, bytes(4096)):
            pass
    os.close(ballast)


def test_the_log_says_how_many_lines_are_missing_when_there_is_room_again(net: Net, server: Server) -> None:
    with small_disk() as root:
        file = os.open("log", os.O_CREAT | os.O_RDWR | os.O_APPEND, dir_fd=root)
        with relay(net, file):
            served(net, 5)
            relay_net.until(lambda: text(file).count('"connection"') == 5)
            fill_disk(root)
            served(net, 50)
            relay_net.until(lambda: figure(net, "log_lines_dropped_total") > 30)
            os.unlink("ballast", dir_fd=root)
            relay_net.until(lambda: DROPPED in text(file))
            served(net, 5)
            lost = figure(net, "log_lines_dropped_total")
        lines, broken = [], 0
        for line in text(file).splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the disk was full in the middle of it
                broken += 1
        os.close(file)
    told = [line["lines"] for line in lines if line["event"] == DROPPED]
    logged = [line for line in lines if line["event"] == "connection"]
    assert broken <= 1
    assert sum(told) == lost
    assert len(logged) + lost == 60


def text(file: int) -> str:
    return os.pread(file, 1 << 20, 0).decode()


def test_a_reader_that_comes_back_gets_every_line_whole(net: Net, server: Server) -> None:
    """Of two workers that share the pipe; somebody else has made it O_NONBLOCK."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    heard: list[bytes] = []

    def listen() -> None:
        while data := os.read(reader, 65536):
            heard.append(data)

    with relay(net, writer, "--workers", "2"):
        served(net)
        thread = threading.Thread(target=listen)
        thread.start()
        served(net, 20)
    os.close(writer)
    thread.join()
    os.close(reader)
    lines = [json.loads(line) for line in b"".join(heard).splitlines()]
    assert sum(line["event"] == "connection" for line in lines) == CONNECTIONS + 20


def test_a_successor_starts_beside_a_stalled_log(net: Net, server: Server) -> None:
    with stalled_pipe() as stderr, relay(net, stderr) as running:
        served(net)
        running.send_signal(signal.SIGUSR2)
        relay_net.until(lambda: running.poll() is not None)
        assert running.returncode == 0
        successor = listening_process(net)
        try:
            served(net)
        finally:
            os.kill(successor, signal.SIGTERM)
            relay_net.until(lambda: not relay_net.is_running(successor))


def listening_process(net: Net) -> int:
    shown = net.on_host("ss", "-Htlnp", "sport = :15001")
    return int(shown.partition("pid=")[2].partition(",")[0])


def test_a_manager_that_hears_nothing_holds_nobody_up(
    net: Net, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd hangs: what it is told of fills its queue."""
    name = f"tpctl-deaf-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    with net.inside(net.host), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        fill(name)
        with full() as stderr, relay(net, stderr) as running:
            served(net, 50)
            running.send_signal(signal.SIGHUP)
            relay_net.until(lambda: reloads(net))
            served(net, 50)


def fill(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sender.sendto(b"x", f"\0{name}"):
                pass
