"""A transparent listener behind TPROXY: the application sees the client's own address, through the relay."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import relay_net
from tests.netns.relay_net import HOST, HOST4, HOST6, PEER, Net
from tests.netns.test_relay_listeners import configured, serving

pytestmark = pytest.mark.root
TEXT = """
listeners:
  - {listen: "[::]:15006 ipv6only=off transparent", direction: inbound, source: client}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """By hand: what arrives on eth0 is given to the relay, and answers to its dials are brought back to it."""
    with relay_net.network(redirect=False) as network:
        network.on_host("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.lo.rp_filter=0")
        for family, tables in (("-4", "iptables"), ("-6", "ip6tables")):
            tproxy = ("-j", "TPROXY", "--on-port", "15006", "--tproxy-mark", "1")
            network.on_host(
                tables, "-w", "-t", "mangle", "-A", "PREROUTING", "-i", "eth0", "-p", "tcp", "--dport", "8080", *tproxy
            )
            network.on_host(tables, "-w", "-t", "mangle", "-A", "OUTPUT", "-p", "tcp", "--sport", "8080", "-m", "owner",
                            "--uid-owner", "0", "-j", "MARK", "--set-mark", "1")  # fmt: skip
            network.on_host("ip", family, "rule", "add", "fwmark", "1", "lookup", "100")
            network.on_host("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "100")
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
