"""Reloads, metrics and socket activation of a running relay."""

from __future__ import annotations

import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, PEER4, Net, Relay
from tests.netns.relay.test_listeners import configured, serving

pytestmark = pytest.mark.root
PORTS = """
workers: {workers}
metrics: 127.0.0.1:9902
listeners:
"""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LISTENER = '  - {{listen: "*:{port}", direction: outbound, upstream: "{peer}:{to}", name: {name}{more}}}\n'


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


def listener(port: int, to: int, name: str, more: str = "") -> str:
    return LISTENER.format(port=port, to=to, name=name, more=more, peer=PEER4)


def said(net: Net, port: int) -> bytes:
    """What the server behind a port of the relay says; nothing when the relay resets the connection."""
    try:
        with net.connect(net.host, (HOST4, port)) as client:
            return relay_net.read_all(client)
    except ConnectionResetError:
        return b""


def say(word: bytes) -> relay_net.Service:
    return lambda client, _peer: client.sendall(word)


def rewrite(running: Relay, directory: Path, text: str, event: str = "the configuration was reloaded") -> None:
    (directory / "relay.yaml").write_text(text)
    before = len([line for line in running.lines() if line["event"].startswith("the configuration")])
    running.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + relay_net.PATIENCE
    while len(found := [line for line in running.lines() if line["event"].startswith("the configuration")]) == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert found[-1]["event"].startswith(event), found[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_changes_listeners_and_keeps_connections(net: Net, directory: Path, workers: int) -> None:
    begin = PORTS.format(workers=workers)
    first = begin + listener(1101, 7001, "kept") + listener(1102, 7001, "removed")
    second = begin + listener(1101, 7002, "kept") + listener(1103, 7002, "added")
    with (
        configured(net, directory, first) as running,
        serving(net, net.peer, (PEER4, 7001), say(b"one")),
        serving(net, net.peer, (PEER4, 7002), say(b"two")),
        serving(net, net.peer, (PEER4, 7003), relay_net.echo),
    ):
        assert (said(net, 1101), said(net, 1102)) == (b"one", b"one")
        rewrite(running, directory, begin + listener(1101, 7003, "kept") + listener(1102, 7001, "removed"))
        with net.connect(net.host, (HOST4, 1101)) as lasting:
            lasting.sendall(b"a")
            assert lasting.recv(1) == b"a"
            rewrite(running, directory, second)
            assert [said(net, port) for port in (1101, 1103) for _ in range(4)] == [b"two"] * 8
            with pytest.raises(ConnectionRefusedError):
                net.connect(net.host, (HOST4, 1102))
            lasting.sendall(b"b")
            assert lasting.recv(1) == b"b"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_configuration_that_is_not_in_order_changes_nothing(net: Net, directory: Path, workers: int) -> None:
    begin = PORTS.format(workers=workers)
    good = begin + listener(1101, 7001, "kept")
    with configured(net, directory, good) as running, serving(net, net.peer, (PEER4, 7001), say(b"one")):
        taken = net.listen(net.host, ("0.0.0.0", 1109))
        for bad, problem in (
            (good.replace("outbound", "sideways"), "sideways"),
            ("{", "is not YAML"),
            (good + listener(1109, 7001, "taken"), "port 1109 of 0.0.0.0 for the taken listener is in use"),
            (good.replace(f"workers: {workers}", "workers: 7"), "workers: the change"),
            (good.replace("*:1101", "*:1101 reuseport"), "reuseport of 0.0.0.0:1101 has changed"),
            (good + "dns: {zone_file: /nonexistent.yaml}\n", "/nonexistent.yaml"),
        ):
            rewrite(running, directory, bad, "the configuration is invalid, the old one stays")
            problems = [line for line in running.lines() if line["event"].startswith("the configuration is")][-1]
            assert problem in " ".join(problems["problems"])
            assert said(net, 1101) == b"one"
        taken.close()
        rewrite(running, directory, good)
        shown = scrape(net, 9902)
    assert shown['configuration_reloads_total{result="refused"}'] == 6
    assert shown['configuration_reloads_total{result="used"}'] == 1


def test_access_rules_of_a_reload_are_for_new_connections(net: Net, directory: Path) -> None:
    begin = PORTS.format(workers=2)
    with (
        configured(net, directory, begin + listener(1101, 7003, "x")) as running,
        serving(net, net.peer, (PEER4, 7003), relay_net.echo),
        net.connect(net.host, (HOST4, 1101)) as before,
    ):
        before.sendall(b"a")
        assert before.recv(1) == b"a"
        denying = listener(1101, 7003, "x", ", access: {deny: [10.99.0.0/24]}").replace("outbound", "inbound")
        rewrite(running, directory, begin + denying)
        assert said(net, 1101) == b""
        before.sendall(b"b")
        assert before.recv(1) == b"b"


def scrape(net: Net, port: int) -> dict[str, float]:
    """The figures by name and labels, checked to be the format they say they are."""
    with net.inside(net.host), DIRECT.open(f"http://127.0.0.1:{port}/metrics", timeout=relay_net.TIMEOUT) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line), line
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name.removeprefix("tpctl_relay_")] = float(value)
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_the_figures_are_those_of_all_workers(net: Net, directory: Path, workers: int) -> None:
    text = PORTS.format(workers=workers) + listener(1101, 7003, "x") + listener(1102, 9, "closed")
    with configured(net, directory, text), serving(net, net.peer, (PEER4, 7003), relay_net.echo):
        clients = [net.connect(net.host, (HOST4, 1101)) for _ in range(12)]
        for client in clients:
            client.sendall(b"1234567890")
            assert client.recv(10) == b"1234567890"
        assert said(net, 1102) == b""
        # What lasting connections have moved is counted every two seconds.
        relay_net.until(lambda: scrape(net, 9902)['bytes_total{listener="x",to="client"}'] == 120)
        shown = scrape(net, 9902)
        for client in clients[:5]:
            client.close()
        relay_net.until(lambda: scrape(net, 9902)['connections_active{listener="x"}'] == 7)
        later = scrape(net, 9902)
        for client in clients[5:]:
            client.close()
    assert shown['connections_accepted_total{listener="x"}'] == 12
    assert (shown['connections_active{listener="x"}'], later['connections_active{listener="x"}']) == (12, 7)
    assert shown['bytes_total{listener="x",to="upstream"}'] == shown['bytes_total{listener="x",to="client"}'] == 120
    assert later['connections_ended_total{listener="x",reason="closed"}'] == 5
    assert shown['connections_ended_total{listener="closed",reason="not_reached"}'] == 1
    assert shown["workers"] == workers


def test_the_metrics_listener_survives_bad_clients(net: Net, directory: Path) -> None:
    text = PORTS.format(workers=1) + listener(1101, 7003, "x")
    with configured(net, directory, text):
        silent = [net.connect(net.host, ("127.0.0.1", 9902)) for _ in range(8)]
        for request, status in (
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405"),
            (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"HTTP/1.1 404"),
            (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200"),
            (b"\r\n\r\n", b"HTTP/1.1 405"),
        ):
            with net.connect(net.host, ("127.0.0.1", 9902)) as client:
                client.sendall(request)
                answer = relay_net.read_all(client)
                assert answer.startswith(status)
                assert status != b"HTTP/1.1 200" or answer.endswith(b"\r\n\r\n")
        assert scrape(net, 9902)["workers"] == 1
        for client in silent:
            client.close()


def test_systemds_socket_activation(net: Net, directory: Path) -> None:
    """By systemd's own tool: the first client starts the relay, which opens only what it was not given."""
    text = PORTS.format(workers=2) + listener(1101, 7003, "x") + listener(1102, 7003, "y")
    (directory / "relay.yaml").write_text(text)
    prefix = ("systemd-socket-activate", "-l", "0.0.0.0:1101", "--fdname=x")
    running = Relay(net, directory, "--config", str(directory / "relay.yaml"), prefix=prefix)
    try:
        with serving(net, net.peer, (PEER4, 7003), relay_net.echo):
            relay_net.until(lambda: net.on_host("ss", "-Hltn", "sport = :1101"))
            for port in (1101, 1102):
                with net.connect(net.host, (HOST4, port)) as client:
                    client.sendall(b"z")
                    assert client.recv(1) == b"z"
                running.wait_for("ready")
            assert len(net.on_host("ss", "-Hltn", "sport = :1101").splitlines()) == 1
    finally:
        assert running.stop() == 0


def test_a_socket_that_belongs_to_nobody_is_pointed_out(net: Net, directory: Path) -> None:
    (directory / "relay.yaml").write_text(PORTS.format(workers=1) + listener(1101, 7003, "x"))
    prefix = ("systemd-socket-activate", "-l", "0.0.0.0:1105", "--fdname=other")
    running = Relay(net, directory, "--config", str(directory / "relay.yaml"), prefix=prefix)
    try:
        relay_net.until(lambda: net.on_host("ss", "-Hltn", "sport = :1105"))
        net.connect(net.host, (HOST4, 1105)).close()
        assert running.wait_for("a socket that was handed over")["address"] == "0.0.0.0:1105"
    finally:
        assert running.stop() == 0


def test_systemd_is_told_about_a_reload(net: Net, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"@tpctl-test-{directory}")
    # An abstract socket belongs to a network namespace, here the relay's.
    with net.inside(net.host), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0tpctl-test-{directory}")
        manager.settimeout(relay_net.TIMEOUT)
        text = PORTS.format(workers=2) + listener(1101, 7003, "x")
        with configured(net, directory, text) as running:
            assert manager.recv(200) == b"READY=1"
            rewrite(running, directory, text)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(200))
            assert manager.recv(200) == b"READY=1"
