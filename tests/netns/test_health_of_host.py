"""What status says of the host that the data plane is on: addresses of lo, and ports that others may get."""

from __future__ import annotations

import os
import socket

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net
from tests.netns.test_health import LOST_SECONDS, OUT, POLICY, Bound, alone, arrives, data_plane, status
from tpctl.change import health

pytestmark = pytest.mark.root
__all__ = ["alone"]


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1/8"), (socket.AF_INET6, "::1/128")], ids=["127.0.0.1", "::1"]
)
def test_an_address_that_lo_has_lost(alone: Net, family: socket.AddressFamily, address: str) -> None:
    """Status says that it is missed, if it is: routes that serve bound sockets may still lead there."""
    with data_plane(alone, Bound("::")):
        alone.on_host("ip", "address", "del", address, "dev", "lo")
        try:
            with alone.inside(alone.host):
                wanted = list(health.loopback_problems(POLICY))
            assert bool(wanted) == (not arrives(alone, alone.host, PEER[family], family))
            routes = alone.on_host("ip", f"-{4 if family == socket.AF_INET else 6}", "route", "show", "table", "local")
            for route in routes.splitlines():
                if route.split()[1] == address.partition("/")[0] and " lo " not in f"{route} ":
                    alone.on_host("ip", "route", "del", *route.split())
            with alone.inside(alone.host):
                (problem,) = health.loopback_problems(POLICY)
            assert problem.startswith(f"{address.partition('/')[0]} is not an address of lo")
            assert not arrives(alone, alone.host, PEER[family], family, LOST_SECONDS)
            assert status(alone)[0] == 3
        finally:
            alone.on_host("ip", "address", "add", address, "dev", "lo")
            with alone.inside(alone.host):
                lab.tpctl("apply")
        assert status(alone)[0] == 0


def test_the_passthrough_address_and_lo_itself(alone: Net) -> None:
    with data_plane(alone, Bound("::")):
        for argv, problem in (
            (("address", "del", "::6/128", "dev", "lo"), "::6 is not on lo"),
            (("link", "set", "lo", "down"), "the interface lo is down"),
        ):
            alone.on_host("ip", *argv)
            code, report = status(alone)
            alone.on_host("ip", "link", "set", "lo", "up")
            with alone.inside(alone.host):
                lab.tpctl("apply")
            assert code == 3
            assert any(one.startswith(problem) for one in report["problems"]), report["problems"]
            assert status(alone)[0] == 0


def test_ports_that_an_outgoing_connection_may_get(alone: Net) -> None:
    """Such a connection keeps the data plane from listening; neither the range nor who has the port is a riddle."""
    family = socket.AF_INET
    listener = alone.listen(alone.peer, (PEER[family], 22))
    alone.on_host("sysctl", "-qw", "net.ipv4.ip_local_port_range=15000 15010")
    try:
        with data_plane(alone, Bound("::")):
            code, report = status(alone)
            assert (code, report["problems"]) == (0, [])
            (warning,) = report["warnings"]
            assert "ip_local_port_range (15000-15010) holds ports 15001, 15006" in warning
            assert "ip_local_reserved_ports=15001,15006" in warning
        with alone.inside(alone.host):
            client = socket.socket(family)
            client.bind((HOST[family], OUT))
        with client, listener:
            client.connect((PEER[family], 22))
            with alone.inside(alone.host):
                taken = [one for one in health.port_warnings(POLICY) if "is taken" in one]
            assert len(taken) == 1
            assert f"tcp port {OUT} (outbound) is taken: a connection of " in taken[0]
            assert f"(process {os.getpid()}) of uid 0 goes out from it" in taken[0]
            with alone.inside(alone.host):
                relay = lab.tpctl("relay", "--user", relay_net.RELAY_USER, check=False)
            assert relay.returncode != 0
            # It is the data plane's user by then, and does not see processes of others.
            who = "a connection of a process of uid 0 goes out from it"
            assert f"TCP port {OUT} of :: for the outbound listener is in use ({who})" in relay.stderr
        alone.on_host("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=15000-15005,15006")
        with alone.inside(alone.host):
            assert list(health.port_warnings(POLICY)) == []
    finally:
        alone.on_host("sysctl", "-qw", "net.ipv4.ip_local_port_range=32768 60999")
        alone.on_host("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=")
