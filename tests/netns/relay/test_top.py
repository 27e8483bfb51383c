"""`tpctl top` beside a real relay with traffic: its values, its ends, and the terminals it meets."""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tpctl
from tests.netns.relay import net as relay_net
from tests.netns.relay.accelerated import exactly
from tests.netns.relay.net import HOST4, PEER4, Net
from tests.netns.relay.test_listeners import configured, serving
from tests.schemas import validated

pytestmark = pytest.mark.root
METRICS = "127.0.0.1:9902"
TEXT = f"""
workers: 2
metrics: {METRICS}
listeners:
  - {{listen: "*:1101", direction: outbound, upstream: "{PEER4}:7003", name: served}}
  - {{listen: "*:1102", direction: inbound, upstream: "{PEER4}:9", name: dead}}
  - {{listen: "*:1103", direction: outbound, upstream: "{PEER4}:7003", access: {{deny: [0.0.0.0/0]}}, name: never}}
"""
ROUNDS = 20


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


def argv(net: Net, *options: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{net.host}", sys.executable, "-m", "tpctl.cli.main", "top", *options]


def top(net: Net, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(net, *options), capture_output=True, text=True, timeout=180, check=False)


@contextlib.contextmanager
def running(net: Net, *options: str, **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A `tpctl top` that is killed in the end, if it still runs."""
    # A shell lets what it starts in the background ignore SIGINT, and so does all that that starts.
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(argv(net, *options), preexec_fn=heeding, **popen)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def refused(net: Net) -> None:
    """A connection whose upstream is not there."""
    with contextlib.suppress(ConnectionResetError), net.connect(net.host, (HOST4, 1102)) as client:
        client.recv(1)


def has_seen_all(shown: dict[str, Any]) -> bool:
    """Whether all that was sent has been counted, and all that is over."""
    served, dead, _never = shown["listeners"]
    moved = served["bytesToClient"]["total"] + served["bytesToUpstream"]["total"]
    return bool(moved == 2 * (ROUNDS * 10 + 1000) and served["open"] == 2 and dead["open"] == 0)


def test_the_values_are_those_of_the_traffic(net: Net, tmp_path: Path) -> None:
    before = time.time()
    with (
        configured(net, tmp_path, TEXT) as relay,
        serving(net, net.peer, (PEER4, 7003), relay_net.echo),
        net.connect(net.host, (HOST4, 1101)) as lasting,
        net.connect(net.host, (HOST4, 1101)),
        running(net, "--metrics", METRICS, "--json", "--interval", "1", stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        for _ in range(ROUNDS):
            with net.connect(net.host, (HOST4, 1101)) as client:
                client.sendall(b"0123456789")
                assert client.recv(10) == b"0123456789"
            refused(net)
        lasting.sendall(b"x" * 1000)
        seen = [first]
        while not has_seen_all(seen[-1]):
            seen.append(json.loads(process.stdout.readline()))
            assert len(seen) < 60
        once = top(net, "--config", str(tmp_path / "relay.yaml"), "--once", "--interval", "0.5")
        asked = {
            name: net.on_host("curl", "-s", f"http://{METRICS}/{name}") for name in ("healthz", "ready", "metrics")
        }
        process.send_signal(signal.SIGINT)
        assert process.wait(relay_net.PATIENCE) == 0
        relay.wait_for("connection", listener="dead")
    assert (asked["healthz"], asked["ready"]) == ("ok\n", "ok\n")
    for line in (
        f'connect_seconds_count{{listener="served"}} {ROUNDS + 2}', 'connect_seconds_count{listener="dead"} 0',
        f'connection_seconds_count{{listener="dead"}} {ROUNDS}', f'build_info{{version="{tpctl.__version__}",',
    ):  # fmt: skip
        assert f"\ntpctl_relay_{line}" in asked["metrics"]
    for one in (first, seen[-1]):
        validated(json.dumps(one))
    served, dead, never = seen[-1]["listeners"]
    assert [one["name"] for one in (served, dead, never)] == ["served", "dead", "never"]
    assert (served["direction"], dead["direction"], served["listen"]) == ("outbound", "inbound", "0.0.0.0:1101")
    assert first["listeners"][0]["accepted"]["perSecond"] is None, "there was nothing to compare with"
    assert served["open"] == 2
    assert served["accepted"]["total"] == ROUNDS + 2
    assert served["ended"]["closed"]["total"] == ROUNDS
    assert served["bytesToUpstream"]["total"] == ROUNDS * 10 + 1000
    assert dead["ended"] == {"notReached": {"total": ROUNDS, "perSecond": dead_rate(dead)}}
    assert never["accepted"]["total"] == never["open"] == 0
    assert any(one["listeners"][0]["accepted"]["perSecond"] for one in seen[1:])
    assert (seen[-1]["workers"], seen[-1]["draining"], seen[-1]["metrics"]) == (2, 0, METRICS)
    since = calendar.timegm(time.strptime(first["since"], "%Y-%m-%dT%H:%M:%SZ"))
    assert before - 1 <= since <= time.time()
    assert once.returncode == 0, once.stderr
    rows = [line.split() for line in once.stdout.splitlines()]
    assert f"relay at {METRICS}: serving, 2 workers, since" in once.stdout
    assert ["served", "outbound", "0.0.0.0:1101", "2", "0.0", "0", "B", "0", "B", "0.0"] in rows
    assert ["dead", "the", "upstream", "was", "not", "reached", str(ROUNDS), "0.0"] in rows


def test_the_clients_with_most_connections_and_bytes(net: Net, tmp_path: Path) -> None:
    many, much = "10.99.0.101", "10.99.0.102"
    for address in (many, much):
        net.add_address(net.peer, f"{address}/24")
    with (
        configured(net, tmp_path, TEXT),
        serving(net, net.peer, (PEER4, 7003), relay_net.echo),
        contextlib.ExitStack() as clients,
    ):
        for address, connections, size in ((many, 9, 10), (much, 1, 100_000), (PEER4, 3, 0)):
            for _ in range(connections):
                with net.inside(net.peer):
                    client = clients.enter_context(socket.socket())
                client.settimeout(relay_net.TIMEOUT)
                client.bind((address, 0))
                client.connect((HOST4, 1101))
                if size:
                    client.sendall(b"x" * size)
                    assert len(exactly(client, size)) == size
        expected = [(many, 9, 90, 90), (PEER4, 3, 0, 0), (much, 1, 100_000, 100_000)]
        with running(net, "--metrics", METRICS, "--json", "--interval", "0.5", stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            end = time.monotonic() + relay_net.PATIENCE
            shown: list[tuple[Any, ...]] = []
            while shown != expected and time.monotonic() < end:
                shown = [tuple(one.values()) for one in json.loads(process.stdout.readline())["clients"]]
            assert shown == expected, "once both workers have told"
        picture = top(net, "--metrics", METRICS, "--once", "--interval", "0.2").stdout
        assert [many, "9", "90", "B", "90", "B"] in [line.split() for line in picture.splitlines()]
        assert "client_connections" not in net.on_host("curl", "-s", f"http://{METRICS}/metrics")


def dead_rate(listener: dict[str, Any]) -> Any:
    return listener["ended"]["notReached"]["perSecond"]


def test_dns_queries_and_a_unix_socket(net: Net, tmp_path: Path) -> None:
    with relay_net.public_directory() as directory, relay_net.public_directory() as files:
        directory.chmod(0o777)
        (files / "zone.yaml").write_text("names: {one.mesh: 10.0.0.1}")
        where = f"unix:{directory}/metrics.sock"
        text = f"""
metrics: {where}
dns: {{zone_file: {files}/zone.yaml}}
listeners: [{{listen: "127.0.0.1:53", direction: dns}}]
"""
        with configured(net, tmp_path, text, "--user", "root"):
            for _ in range(3):
                answer = net.on_host("dig", "+short", "+tries=1", "+time=20", "@127.0.0.1", "one.mesh")
                assert answer == "10.0.0.1\n"
            shown = json.loads(top(net, "--metrics", where, "--once", "--json", "--interval", "0.2").stdout)
            assert (shown["dns"]["udp"]["total"], shown["dns"]["local"]["total"]) == (3, 3)
            assert (
                "DNS queries/s: udp 0.0  tcp 0.0" in top(net, "--metrics", where, "--once", "--interval", "0.2").stdout
            )


def test_a_relay_that_drains_and_goes(net: Net, tmp_path: Path) -> None:
    text = TEXT.replace("workers: 2", "drain_timeout: 5m")
    with (
        relay_net.public_directory() as directory,
        serving(net, net.peer, (PEER4, 7003), relay_net.echo),
        contextlib.closing(started(net, directory, text)) as relay,
        net.connect(net.host, (HOST4, 1101)),
        running(net, "--metrics", METRICS, "--json", "--interval", "0.2", stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["draining"] == 0
        relay.process.send_signal(signal.SIGTERM)
        until(process, lambda shown: shown.get("draining") == 1)
        relay.stop()
        until(process, lambda shown: "no relay serves metrics" in shown.get("problem", ""))
        again = started(net, directory, text)
        try:
            shown = until(process, lambda shown: "listeners" in shown)
            assert shown["listeners"][0]["accepted"]["total"] == 0
        finally:
            again.close()


class _Started(relay_net.Relay):
    def close(self) -> None:
        self.stop(signal.SIGQUIT)


def started(net: Net, directory: Path, text: str) -> _Started:
    path = directory / "relay.yaml"
    path.write_text(text)
    relay = _Started(net, directory, "--config", str(path))
    relay.wait_for("ready")
    return relay


def until(process: subprocess.Popen[bytes], condition: Any) -> Any:
    """The first picture that is so."""
    assert process.stdout is not None
    for _ in range(300):
        shown = json.loads(process.stdout.readline())
        if condition(shown):
            return shown
    raise AssertionError(shown)


def test_who_does_not_answer_and_what_is_asked_wrongly(net: Net, tmp_path: Path) -> None:
    silent = top(net, "--metrics", METRICS, "--once")
    assert (silent.returncode, silent.stdout) == (2, "")
    assert silent.stderr == (
        f"error: no relay serves metrics at {METRICS}: Connection refused; `tpctl relay` serves them with --metrics\n"
    )

    def no_relay(client: socket.socket, _peer: object) -> None:
        client.recv(4096)
        client.sendall(b"SSH-2.0-x\r\n")

    with serving(net, net.host, ("127.0.0.1", 9902), no_relay):
        other = top(net, "--metrics", METRICS)
        assert (other.returncode, "does not speak HTTP" in other.stderr) == (2, True), other.stderr
    tmp_path.chmod(0o755)
    (tmp_path / "relay.yaml").write_text(TEXT.replace(f"metrics: {METRICS}\n", ""))
    for options, why in (
        (["--config", str(tmp_path / "relay.yaml")], "metrics: is missing, so the relay serves none"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (["--metrics", "here"], '--metrics: "here" is not an address'),
        (["--metrics", METRICS, "--config", str(tmp_path / "relay.yaml")], "use only one of them"),
        (["--metrics", METRICS, "--interval", "0"], "--interval"),
    ):
        wrong = top(net, *options)
        assert (wrong.returncode, wrong.stdout) == (2, ""), wrong
        assert why in wrong.stderr


@contextlib.contextmanager
def terminal(columns: int, rows: int) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of that size."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def heard(ours: int, end: bytes, times: int) -> bytes:
    """What a terminal is sent, until a text has come so often."""
    data, deadline = b"", time.monotonic() + relay_net.PATIENCE
    while data.count(end) < times and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            data += os.read(ours, 65536)
    return data


@pytest.mark.parametrize(("name", "columns", "rows"), [("xterm", 34, 5), ("xterm", 200, 50), ("dumb", 80, 24)])
def test_terminals(net: Net, tmp_path: Path, name: str, columns: int, rows: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": name}
    with configured(net, tmp_path, TEXT), terminal(columns, rows) as (ours, theirs):
        options = {"stdout": theirs, "stdin": theirs, "env": environment, "start_new_session": True}
        with running(net, "--metrics", METRICS, "--interval", "0.2", **options) as process:
            shown = heard(ours, b"relay at", 3)
            process.send_signal(signal.SIGINT)
            assert process.wait(relay_net.PATIENCE) == 0
    if name == "dumb":
        assert b"\x1b" not in shown
        assert shown.count(b"LISTENER") >= 2
        return
    picture = shown.split(b"\x1b[J")[1].decode().removeprefix("\x1b[H").replace("\x1b[K", "")
    lines = picture.replace("\r", "").splitlines()
    assert len(lines) <= rows - 1
    assert max(map(len, lines)) <= columns
    assert ("never" in picture) is (rows > 6)


def test_a_reader_that_has_seen_enough(net: Net, tmp_path: Path) -> None:
    with (
        configured(net, tmp_path, TEXT),
        running(
            net, "--metrics", METRICS, "--interval", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"relay at")
        process.stdout.close()
        assert process.wait(relay_net.PATIENCE) == 0
        assert process.stderr.read() == b""
        process.stderr.close()
