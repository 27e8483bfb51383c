"""`--inbound-mode tproxy` from end to end: a client on another host, `tpctl relay --transparent`, an application."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net
from tpctl.change import routing
from tpctl.record import state
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root
ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
FAMILIES = (socket.AF_INET, socket.AF_INET6)
PORT = 8080


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        yield network


def install(net: Net, engine: str, *flags: str) -> None:
    with net.inside(net.host):
        lab.tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], *flags)


def transparent(net: Net, engine: str) -> None:
    install(net, engine, "--inbound-mode", "tproxy")


def uninstall(net: Net) -> str:
    with net.inside(net.host):
        done = lab.tpctl("uninstall")
    return done.stdout + done.stderr


def held(net: Net) -> dict[str, str]:
    """Everything of netfilter and policy routing on our host."""
    with net.inside(net.host):
        found = lab.snapshot(counters=False)
        for tool in ("iptables-legacy-save", "ip6tables-legacy-save"):  # tables that were once used stay, empty
            found[tool] = "".join(line for line in found[tool].splitlines(True) if line.startswith(("-A", ":TPCTL")))
        for version in ("-4", "-6"):
            found[f"rules {version}"] = lab.run(["ip", version, "rule"]).stdout
            routes = lab.run(["ip", version, "route", "show", "table", "all"]).stdout
            # Link-local addresses come in their own time.
            found[f"routes {version}"] = "".join(line for line in routes.splitlines(True) if "fe80::" not in line)
    return found


@contextlib.contextmanager
def application(net: Net, service: relay_net.Service) -> Iterator[None]:
    servers = [relay_net.Server(net.listen(net.host, (HOST[family], PORT)), service) for family in FAMILIES]
    try:
        yield
    finally:
        for server in servers:
            server.close()


def seen(net: Net, family: socket.AddressFamily, source: str | None = None) -> list[object]:
    """What the application says of a new connection."""
    with net.connect(net.peer, (HOST[family], PORT), source) as client:
        found: list[object] = json.loads(relay_net.read_all(client))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_the_application_sees_the_client_and_uninstall_leaves_nothing(net: Net, tmp_path: Path, engine: str) -> None:
    before = held(net)
    transparent(net, engine)
    transparent(net, engine)
    with (
        application(net, relay_net.say_who("application")),
        relay_net.relay(net, tmp_path, "--transparent", "--access-log") as running,
    ):
        for family in FAMILIES:
            assert seen(net, family) == ["application", PEER[family], HOST[family], PORT]
            assert running.wait_for("connection", client=PEER[family])["listener"] == "inbound"
        with net.inside(net.host):
            lab.tpctl("status")
            assert routing.present() == set(Family)
    uninstall(net)
    assert unlike(net, before) == {}


def test_uninstall_without_a_record(net: Net) -> None:
    before = held(net)
    transparent(net, "nftables")
    with net.inside(net.host):
        state.clear()
        assert "no record" in lab.tpctl("status", check=False).stdout
    uninstall(net)
    assert held(net) == before


def test_a_rule_and_a_table_of_others_stay(net: Net) -> None:
    others = ("fwmark", "0x1000/0x1000", "lookup", "77", "priority", "77")
    for version in ("-4", "-6"):
        net.on_host("ip", version, "rule", "add", *others)
        net.on_host("ip", version, "route", "add", "local", "default", "dev", "lo", "table", "77")
    before = held(net)
    transparent(net, "nftables")
    uninstall(net)
    assert held(net) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_transparent_listener_nothing_reaches_the_application(net: Net, tmp_path: Path, engine: str) -> None:
    transparent(net, engine)
    heard: list[object] = []
    with application(net, lambda client, _peer: heard.append(client)):
        for options in ((), None):
            around = relay_net.relay(net, tmp_path, *options) if options is not None else contextlib.nullcontext()
            with around, net.inside(net.peer), socket.socket() as client:
                client.settimeout(1)
                with pytest.raises((ConnectionRefusedError, TimeoutError)):
                    client.connect((HOST[socket.AF_INET], PORT))
    assert not heard


class Chat:
    """A connection through the data plane that exchanges a byte now and then."""

    def __init__(self, net: Net, family: socket.AddressFamily) -> None:
        self.socket = net.connect(net.peer, (HOST[family], PORT))
        self.goes_on()

    def goes_on(self) -> None:
        self.socket.sendall(b"x")
        assert self.socket.recv(1) == b"x"

    def close(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_running_connections_survive_uninstall_and_every_change_of_mode(net: Net, tmp_path: Path, engine: str) -> None:
    before = held(net)
    with application(net, relay_net.echo), relay_net.relay(net, tmp_path, "--transparent"):
        install(net, engine)
        redirected = [Chat(net, family) for family in FAMILIES]
        transparent(net, engine)
        handed = [Chat(net, family) for family in FAMILIES]
        for chat in (*redirected, *handed):
            chat.goes_on()
        install(net, engine)
        more = [Chat(net, family) for family in FAMILIES]
        everything = (*redirected, *handed, *more)
        for chat in everything:
            chat.goes_on()
        transparent(net, engine)
        for chat in everything:
            chat.goes_on()
        for chat in (redirected[1], more[1]):
            chat.close()  # with ::6 goes what the relay has dialled from it
        said = uninstall(net)
        assert "in the name of clients" in said
        for chat in (redirected[0], more[0], *handed):
            chat.goes_on()
            chat.close()
    left = unlike(net, before)
    end = time.monotonic() + relay_net.PATIENCE
    while left and time.monotonic() < end:  # who waits for the end of the connections takes the rest away
        time.sleep(0.2)
        left = unlike(net, before)
    assert left == {}


def unlike(net: Net, before: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in held(net).items() if text != before[key]}


class Traffic(threading.Thread):
    """Connections from the client without a pause; the application names whom it saw."""

    def __init__(self, net: Net, family: socket.AddressFamily) -> None:
        super().__init__(daemon=True)
        self.net, self.family = net, family
        self.stopping = threading.Event()
        self.sources: dict[str, int] = {}
        self.failed: list[str] = []

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                source = str(seen(self.net, self.family)[1])
                self.sources[source] = self.sources.get(source, 0) + 1
            except (OSError, ValueError) as error:
                self.failed.append(str(error))

    def stop(self) -> None:
        self.stopping.set()
        self.join(relay_net.PATIENCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mode_is_replaced_under_traffic(net: Net, tmp_path: Path, engine: str) -> None:
    """Every connection is served, and by the relay."""
    install(net, engine)
    # Tens of thousands of connections that conntrack remembers for two minutes fill the table of a small machine.
    net.on_host("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_time_wait=10")
    with (
        application(net, relay_net.say_who("application")),
        relay_net.relay(net, tmp_path, "--transparent", "--access-log") as running,
    ):
        traffic = [Traffic(net, family) for family in FAMILIES]
        for each in traffic:
            each.start()
        for _ in range(3):
            transparent(net, engine)
            install(net, engine)
        for each in traffic:
            each.stop()
        served = sum(sum(each.sources.values()) for each in traffic)
        end = time.monotonic() + relay_net.PATIENCE
        while (relayed := sum(line["event"] == "connection" for line in running.lines())) < served:
            assert time.monotonic() < end, "connections went past the relay"
            time.sleep(0.1)
    assert [each.failed for each in traffic] == [[], []]
    for each, passthrough in zip(traffic, ("127.0.0.6", "::6"), strict=True):
        assert set(each.sources) == {PEER[each.family], passthrough}
    assert served == relayed > 50
