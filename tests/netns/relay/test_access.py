"""What the relay refuses, and how many connections it takes, with real clients behind a real redirection."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, Net
from tests.netns.relay.test_listeners import configured, serving

pytestmark = pytest.mark.root
METADATA = ("169.254.169.254", "fd00:ec2::254")
LISTENERS = """
workers: {workers}
listeners:
  - {{listen: "[::]:15006 ipv6only=off", direction: inbound, {inbound}}}
  - {{listen: "[::]:15001 ipv6only=off", direction: outbound, {outbound}}}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(passthrough6=False) as network:
        for address in ("10.99.0.7/24", f"{METADATA[0]}/32", f"{METADATA[1]}/128"):
            network.add_address(network.peer, address)
        for family, via in (("-4", PEER4), ("-6", PEER6)):
            relay_net.run("ip", "-n", network.host, family, "route", "add", "default", "via", via)
        yield network


def text(*, inbound: str = "", outbound: str = "", workers: int = 1) -> str:
    return LISTENERS.format(inbound=inbound, outbound=outbound, workers=workers)


def is_served(net: Net, name: str, address: tuple[str, int], source: str | None = None) -> bool:
    try:
        with net.connect(name, address, source) as client:
            return bool(json.loads(relay_net.read_all(client)))
    except ConnectionResetError:
        return False


def test_sources_of_inbound_and_destinations_of_outbound(net: Net, tmp_path: Path) -> None:
    rules = text(inbound="access: {deny: [10.99.0.7]}", outbound=f"access: {{allow: [{PEER4}]}}")
    who = relay_net.say_who("server")
    with (
        configured(net, tmp_path, rules) as running,
        serving(net, net.host, (HOST4, 8080), who),
        serving(net, net.peer, (PEER4, 443), who),
        serving(net, net.peer, ("10.99.0.7", 443), who),
        serving(net, net.peer, (PEER6, 443), who),
    ):
        assert is_served(net, net.peer, (HOST4, 8080))
        assert not is_served(net, net.peer, (HOST4, 8080), "10.99.0.7")
        assert running.wait_for("refused: the source is denied")["client"] == "10.99.0.7"
        assert is_served(net, net.host, (PEER4, 443))
        assert not is_served(net, net.host, ("10.99.0.7", 443))
        assert not is_served(net, net.host, (PEER6, 443))
        assert running.wait_for("refused: the destination is denied")["destination"] == "10.99.0.7:443"
        running.wait_for("connection", destination=f"{HOST4}:8080", reason="closed")
        running.wait_for("connection", destination=f"{PEER4}:443", reason="closed")
        reasons = [line["reason"] for line in running.lines() if line["event"] == "connection"]
    assert reasons.count("closed") == 2


def test_destinations_of_an_outbound_listener_with_an_upstream_of_its_own(net: Net, tmp_path: Path) -> None:
    rules = text(outbound=f"upstream: '{PEER4}:443', access: {{allow: [10.99.0.7, '{HOST6}'], deny: ['{PEER6}']}}")
    with configured(net, tmp_path, rules) as running, serving(net, net.peer, (PEER4, 443), relay_net.say_who("server")):
        assert is_served(net, net.host, ("10.99.0.7", 443))
        assert not is_served(net, net.host, (PEER6, 443))
        assert running.wait_for("refused: the destination is denied")["destination"] == f"[{PEER6}]:443"
        # Nobody has redirected these: the client wanted to go to the listener itself.
        assert is_served(net, net.host, (HOST6, 15001))
        assert not is_served(net, net.host, (HOST4, 15001))


@pytest.mark.parametrize("host", METADATA)
def test_metadata_services_are_dialled_only_if_that_is_allowed(net: Net, tmp_path: Path, host: str) -> None:
    with serving(net, net.peer, (host, 80), relay_net.say_who("credentials")):
        with configured(net, tmp_path, text()) as running:
            assert not is_served(net, net.host, (host, 80))
            running.wait_for("refused: a cloud's metadata service")
        with configured(net, tmp_path, text(outbound="allow_metadata_addresses: true")):
            assert is_served(net, net.host, (host, 80))
        with relay_net.relay(net, tmp_path, "--allow-metadata-addresses"):
            assert is_served(net, net.host, (host, 80))
        with relay_net.relay(net, tmp_path):
            assert not is_served(net, net.host, (host, 80))


def test_a_loopback_service_is_not_reached_from_afar_where_the_passthrough_address_is_missing(
    net: Net, tmp_path: Path
) -> None:
    who = relay_net.say_who("application")
    with (
        relay_net.relay(net, tmp_path) as running,
        serving(net, net.host, ("::1", 8080), who),
        serving(net, net.host, ("::", 8081), who),
    ):
        assert is_served(net, net.peer, (HOST6, 8081))
        assert not is_served(net, net.peer, (HOST6, 8080))
        running.wait_for("an address that the relay dials")


def test_connections_that_come_back_end_the_loop(net: Net, tmp_path: Path) -> None:
    """As root, which is not the user that the rules let pass."""
    with relay_net.relay(net, tmp_path, user=None) as running:
        assert not is_served(net, net.host, (PEER4, 4444))
        running.wait_for("refused: the relay's own connections come back")
        relay_net.until(lambda: len(list(Path(f"/proc/{running.process.pid}/fd").iterdir())) < 50)


class Clients:
    """Connections to the application, all of them closed in the end."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self.open: list[socket.socket] = []

    def add(self, source: str = PEER4) -> bool:
        """Whether one more is served."""
        try:
            client = self._net.connect(self._net.peer, (HOST4, 8080), source)
            self.open.append(client)
            client.sendall(b"x")
            return client.recv(1) == b"x"
        except ConnectionError:
            return False

    def close(self) -> None:
        for client in self.open:
            client.close()


@pytest.fixture
def clients(net: Net) -> Iterator[Clients]:
    made = Clients(net)
    yield made
    made.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_with_too_many_connections(net: Net, tmp_path: Path, clients: Clients, workers: int) -> None:
    rules = text(inbound="limits: {connections_per_source: 5}", workers=workers)
    with configured(net, tmp_path, rules) as running, serving(net, net.host, (HOST4, 8080), relay_net.echo):
        assert all(clients.add() for _ in range(5))
        assert not clients.add()
        assert clients.add("10.99.0.7")
        assert running.wait_for("refused: the source has too many")["client"] == PEER4
        clients.open[0].close()
        relay_net.until(clients.add)


@pytest.mark.parametrize("per_listener", [True, False])
def test_beyond_the_limit_clients_wait_instead_of_being_refused(
    net: Net, tmp_path: Path, clients: Clients, per_listener: bool
) -> None:
    limits = "limits: {connections: 4}"
    rules = text(inbound=limits, workers=2) if per_listener else text(workers=2) + limits
    with configured(net, tmp_path, rules) as running, serving(net, net.host, (HOST4, 8080), relay_net.echo):
        assert all(clients.add() for _ in range(4))
        with net.connect(net.peer, (HOST4, 8080)) as waiting:
            waiting.sendall(b"x")
            waiting.settimeout(0.5)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            running.wait_for("the limit of connections is reached")
            clients.open[0].close()
            waiting.settimeout(relay_net.TIMEOUT)
            assert waiting.recv(1) == b"x"
