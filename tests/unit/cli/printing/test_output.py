"""How a policy is described."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tpctl.cli.printing.output import describe
from tpctl.spec.policy import Dns, DnsCapture, NameServer, Policy

LINK_LOCAL = NameServer(ip_address("fe80::1"), "eth0")
GLOBAL = NameServer(ip_address("192.0.2.53"))


@pytest.mark.parametrize(
    ("servers", "wanted"),
    [
        ((GLOBAL,), "queries to 192.0.2.53, over UDP"),
        ((LINK_LOCAL, GLOBAL), "queries to 192.0.2.53, over UDP; those to fe80::1%eth0 pass (s1)"),
        ((LINK_LOCAL,), "queries to no server, over UDP; those to fe80::1%eth0 pass (s1)"),
    ],
)
def test_servers_that_cannot_be_captured_are_told_apart(servers: tuple[NameServer, ...], wanted: str) -> None:
    shown = dict(describe(Policy(5678, dns=Dns(DnsCapture.LISTED, servers=servers))))
    assert shown["DNS"] == f"to port 15053, {wanted}"
