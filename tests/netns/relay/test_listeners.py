"""Listeners of a configuration file, on real sockets: their options, upstream rules and timeouts."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, Net, Relay, Server

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


@contextlib.contextmanager
def configured(net: Net, directory: Path, text: str, *options: str) -> Iterator[Relay]:
    """A relay with a configuration file."""
    directory.chmod(0o755)
    path = directory / "relay.yaml"
    path.write_text(text)
    with relay_net.relay(net, directory, "--config", str(path), "--access-log", *options) as running:
        yield running


@contextlib.contextmanager
def serving(net: Net, name: str, address: tuple[str, int], serve: relay_net.Service) -> Iterator[Server]:
    server = Server(net.listen(name, address), serve)
    try:
        yield server
    finally:
        server.close()


def ask(net: Net, name: str, address: tuple[str, int]) -> list[object]:
    with net.connect(name, address) as client:
        answer: list[object] = json.loads(relay_net.read_all(client))
        return answer


def test_a_fixed_address_is_dialled_wherever_the_client_wanted_to_go(net: Net, tmp_path: Path) -> None:
    text = f"""
listeners:
  - {{listen: "*:5432", direction: outbound, upstream: "{PEER4}:7432", name: database}}
  - {{listen: "*:8080", direction: inbound, upstream: "127.0.0.1:80"}}
  - {{listen: "*:8081", direction: inbound, upstream: "{PEER4}:7432"}}
  - {{listen: "[::]:8082", direction: inbound, upstream: "[::1]:80"}}
"""
    with (
        configured(net, tmp_path, text) as running,
        serving(net, net.peer, (PEER4, 7432), relay_net.say_who("db")),
        serving(net, net.host, ("127.0.0.1", 80), relay_net.say_who("web")),
        serving(net, net.host, ("::1", 80), relay_net.say_who("web6")),
    ):
        assert ask(net, net.host, ("127.0.0.1", 5432)) == ["db", HOST4, PEER4, 7432]
        # A loopback service is reached from afar because the configuration says so.
        assert ask(net, net.peer, (HOST4, 8080)) == ["web", "127.0.0.6", "127.0.0.1", 80]
        assert ask(net, net.peer, (HOST6, 8082)) == ["web6", "::6", "::1", 80]
        # From 127.0.0.6 another host could not be reached.
        assert ask(net, net.peer, (HOST4, 8081)) == ["db", HOST4, PEER4, 7432]
        line = running.wait_for("connection", listener="database")
    assert (line["upstream"], line["reason"]) == (f"{PEER4}:7432", "closed")


def test_the_services_of_a_dataplane(net: Net, tmp_path: Path) -> None:
    (tmp_path / "dp.yaml").write_text("""
type: Dataplane
networking:
  inbound: [{port: 8080, servicePort: 80}, {port: 9090, servicePort: 90, serviceAddress: 127.0.0.1}]
""")
    text = f"""
listeners:
  - {{listen: "*:15006", direction: inbound, upstream: dataplane, dataplane_file: {tmp_path}/dp.yaml}}
"""
    with relay_net.network(redirect=False) as network:
        network.restore(4, "*nat\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT\n")
        with (
            configured(network, tmp_path, text),
            serving(network, network.host, (HOST4, 80), relay_net.say_who("renamed")),
            serving(network, network.host, ("127.0.0.1", 90), relay_net.say_who("on loopback")),
            serving(network, network.host, (HOST4, 7070), relay_net.say_who("as it is")),
        ):
            assert ask(network, network.peer, (HOST4, 8080)) == ["renamed", "127.0.0.6", HOST4, 80]
            assert ask(network, network.peer, (HOST4, 9090)) == ["on loopback", "127.0.0.6", "127.0.0.1", 90]
            assert ask(network, network.peer, (HOST4, 7070)) == ["as it is", "127.0.0.6", HOST4, 7070]


def test_options_reach_the_kernel(net: Net, tmp_path: Path) -> None:
    text = f"""
workers: 2
listeners:
  - {{listen: "*:1101 backlog=77", direction: outbound, upstream: "{PEER4}:1"}}
  - {{listen: "[::]:1102 reuseport so_keepalive=5m:20s:3 transparent", direction: outbound, upstream: "{PEER4}:7432"}}
  - {{listen: "[::]:1103 ipv6only=off deferred", direction: outbound, upstream: "{PEER4}:7432"}}
"""
    # As root: transparent needs a capability.
    with (
        relay_net.relay(net, tmp_path, "--config", str(written(tmp_path, text)), user=None),
        serving(net, net.peer, (PEER4, 7432), relay_net.echo),
    ):
        assert re.findall(r"LISTEN +0 +(\d+) +0.0.0.0:1101", net.on_host("ss", "-Hltn")) == ["77"]
        listening = net.on_host("ss", "-Hltne", "sport = :1102")
        assert len(listening.splitlines()) == 2
        assert "v6only:1" in listening
        with pytest.raises(ConnectionRefusedError):
            net.connect(net.peer, (HOST4, 1102))
        with net.connect(net.peer, (HOST6, 1102)) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            # While the client has not acknowledged, the timer is another one.
            asked = ("ss", "-Hton", "sport = :1102")
            relay_net.until(lambda: re.search(r"timer:\(keepalive,(4min|5min)", net.on_host(*asked)))
        relay_net.until(lambda: not is_dialled(net))
        begin = time.monotonic()
        with net.connect(net.peer, (HOST4, 1103)) as client:
            time.sleep(0.3)
            # The kernel does not hand over a connection on which nothing was said, for a second.
            assert not is_dialled(net) or time.monotonic() - begin > 1
            client.sendall(b"y")
            assert client.recv(1) == b"y"


def is_dialled(net: Net) -> bool:
    """Whether the relay has a connection to its upstream."""
    return bool(net.on_host("ss", "-Htn", "state", "established", "dport = :7432"))


def written(directory: Path, text: str) -> Path:
    path = directory / "relay.yaml"
    path.write_text(text)
    return path


def test_transparent_without_the_capability_is_an_error_that_says_so(net: Net, tmp_path: Path) -> None:
    text = 'listeners: [{listen: "*:1101 transparent", direction: inbound}]'
    without = ("setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-net_admin,-net_raw")
    running = Relay(net, tmp_path, "--config", str(written(tmp_path, text)), user=None, prefix=without)
    assert running.exit_code() == 2
    assert "transparent needs the capability CAP_NET_RAW" in next(tmp_path.glob("*.log")).read_text()


def test_workers_share_one_socket_unless_it_is_reuseport(net: Net, tmp_path: Path) -> None:
    text = f"""
workers: 3
listeners: [{{listen: "*:801", direction: outbound, upstream: "{PEER4}:7432"}}]
"""
    with configured(net, tmp_path, text) as running, serving(net, net.peer, (PEER4, 7432), relay_net.echo):
        assert len(net.on_host("ss", "-Hltn", "sport = :801").splitlines()) == 1
        clients = [net.connect(net.host, ("127.0.0.1", 801)) for _ in range(30)]
        for client in clients:
            client.sendall(b"z")
            assert client.recv(1) == b"z"
            client.close()
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        # A port below 1024 needs CAP_NET_BIND_SERVICE; nothing else is left of root.
        assert re.findall(r"Cap(?:Prm|Eff|Amb):\s+(\w+)", status) == ["0000000000000400"] * 3
        assert "NoNewPrivs:\t1" in status


def test_a_unix_socket(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    tmp_path.chmod(0o755)
    text = f"""
listeners: [{{listen: "unix:{path}", direction: outbound, upstream: "{PEER4}:7432"}}]
"""
    with (
        relay_net.relay(net, tmp_path, "--config", str(written(tmp_path, text)), "--access-log", user=None) as running,
        serving(net, net.peer, (PEER4, 7432), relay_net.digest_service(3_000_000)),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(relay_net.TIMEOUT)
        client.connect(str(path))
        client.sendall(relay_net.pattern(2_000_000))
        client.shutdown(socket.SHUT_WR)
        assert len(relay_net.read_all(client)) == 3_000_032
        line = running.wait_for("connection")
    assert (line["client"], line["sent"], line["received"]) == ("unix:", 2_000_000, 3_000_032)


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_who_has_reset_a_connection_of_a_unix_socket(net: Net, tmp_path: Path, who: str) -> None:
    over = threading.Event()

    def serve(server: socket.socket, _peer: object) -> None:
        server.sendall(server.recv(1))
        if who == "upstream":
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        with contextlib.suppress(OSError):
            while not over.is_set():
                server.sendall(relay_net.pattern(100_000))

    path = tmp_path / "relay.sock"
    text = f"""listeners: [{{listen: "unix:{path}", direction: outbound, upstream: "{PEER4}:7432"}}]"""
    with (
        relay_net.relay(net, tmp_path, "--config", str(written(tmp_path, text)), "--access-log", user=None) as running,
        serving(net, net.peer, (PEER4, 7432), serve),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(relay_net.TIMEOUT)
        client.connect(str(path))
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        if who == "upstream":
            with contextlib.suppress(ConnectionResetError):
                relay_net.read_all(client)
        client.close()
        try:
            assert running.wait_for("connection")["reason"] == f"reset by the {who}"
        finally:
            over.set()


def is_reset(client: socket.socket) -> bool:
    """Whether it is before the client's timeout."""
    try:
        assert client.recv(1) == b"never"
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return False


def timed(client: socket.socket) -> float:
    """After how many seconds the relay resets a connection."""
    begin = time.monotonic()
    with pytest.raises(ConnectionResetError):
        relay_net.read_all(client)
    return time.monotonic() - begin


def test_idle_and_half_closed_connections_end_and_busy_ones_do_not(net: Net, tmp_path: Path) -> None:
    text = f"""
timeouts: {{idle: 5s, half_closed: 400ms}}
listeners: [{{listen: "*:1101", direction: outbound, upstream: "{PEER6}:7432"}}]
""".replace(PEER6, f"[{PEER6}]")
    with (
        configured(net, tmp_path, text) as running,
        serving(net, net.peer, (PEER6, 7432), hold),
        net.connect(net.host, (HOST4, 1101)) as idle,
        net.connect(net.host, (HOST4, 1101)) as half,
        net.connect(net.host, (HOST4, 1101)) as busy,
    ):
        half.shutdown(socket.SHUT_WR)
        assert timed(half) > 0.3
        idle.settimeout(0.35)
        end = time.monotonic() + relay_net.PATIENCE
        while not is_reset(idle):
            assert time.monotonic() < end
            busy.sendall(b"x")
        busy.sendall(b"x")
        running.wait_for("connection", reason="half-closed for too long")
        running.wait_for("connection", reason="idle for too long")
        reasons = [line["reason"] for line in running.lines() if line["event"] == "connection"]
    assert sorted(reasons) == ["half-closed for too long", "idle for too long"]


def hold(client: socket.socket, _peer: object) -> None:
    """Read, say nothing, and do not hang up either."""
    while client.recv(100):
        pass
    time.sleep(relay_net.TIMEOUT)


def test_an_upstream_that_does_not_answer_is_given_up(net: Net, tmp_path: Path) -> None:
    drop = ("nsenter", f"--net=/run/netns/{net.peer}", "iptables", "-w", "-I", "INPUT", "-p", "tcp", "--dport", "7001")
    relay_net.run(*drop, "-j", "DROP")
    text = f"""
timeouts: {{connect: 500ms}}
listeners: [{{listen: "*:1101", direction: outbound, upstream: "{PEER4}:7001"}}]
"""
    with configured(net, tmp_path, text) as running, net.connect(net.host, (HOST4, 1101)) as client:
        assert 0.4 < timed(client) < 9, "ten seconds are the default"
        line = running.wait_for("connection")
    assert (line["reason"], line["error"]) == ("the upstream was not reached", "Connection timed out")
