"""Where tpctl deliberately differs from kumactl: rows of docs/kumactl.md that no other test opens connections for."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from tests.netns.lab import APP, PROXY, installed, run
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, PEER_ADDRESS, Layout
from tpctl.spec.policy import Family, Policy

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Our host and another one."""
    with Lab(Layout()) as made:
        yield made


@pytest.mark.parametrize("engine", ENGINES)
def test_an_accept_of_others_keeps_no_connection_from_the_data_plane(lab: Lab, engine: str, variant: str) -> None:
    lab.serve_data_plane(Policy(PROXY))
    connection = lab.layout.outgoing("tcp", ip_address(PEER_ADDRESS[Family.IPV4]), 5432, APP)
    lab.serve(connection)
    with lab.inside(HOST):
        run([f"iptables-{variant}", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "5432", "-j", "ACCEPT"])
    with installed(lab, *ENGINES[engine]):
        reached = str(lab.dial(connection))
    assert reached.endswith(":15001")
