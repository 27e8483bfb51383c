"""A transparent listener behind TPROXY: the application sees the client's own address, through the relay."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, HOST6, PEER, Net
from tests.netns.relay.test_listeners import configured, serving

pytestmark = pytest.mark.root
TEXT = """
listeners:
  - {listen: "[::]:15006 ipv6only=off transparent", direction: inbound, source: client}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """By hand: what arrives on eth0 is given to the relay, and answers to its dials are brought back to it."""
    with relay_net.network(redirect=False) as network:
        network.hand_over_by_tproxy(8080)
        yield network


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_application_sees_the_client(net: Net, tmp_path: Path, family: socket.AddressFamily) -> None:
    with (
        configured(net, tmp_path, TEXT) as running,
        serving(net, net.host, (HOST[family], 8080), relay_net.say_who("application")),
        net.connect(net.peer, (HOST[family], 8080)) as client,
    ):
        assert json.loads(relay_net.read_all(client)) == ["application", PEER[family], HOST[family], 8080]
        client.close()
        line = running.wait_for("connection")
        status = Path(f"/proc/{running.process.pid}/status").read_text()
    assert line["destination"] == f"{HOST4}:8080" if family == socket.AF_INET else f"[{HOST6}]:8080"
    # An ordinary user with CAP_NET_RAW, and nothing else of root.
    assert "Uid:\t65534\t65534" in status
    assert re.findall(r"Cap(?:Prm|Eff):\s+(\w+)", status) == ["0000000000002000"] * 2
