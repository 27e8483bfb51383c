"""What is left to the table of nf_tables beside the programs."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from agent.engines.ebpf.companion import INVALID_PACKETS, TABLE, companion_of
from agent.engines.ebpf.plan import plan_for
from agent.errors import InputError
from agent.policy import Cgroup, Dns, DnsCapture, Inbound, Outbound, Policy, PortRange, VirtualNetwork, WhenProxyDown

PLAIN = Policy(5678, dns=Dns(DnsCapture.ALL))
DOCKER = (VirtualNetwork("docker0", ip_network("172.17.0.0/16")),)


def text(policy: Policy, *, chooses_sockets: bool = True) -> str:
    """The table, or nothing."""
    companion = companion_of(policy, chooses_sockets=chooses_sockets)
    return companion.plan.render() if companion else ""


def test_the_programs_alone_do_what_only_sockets_see() -> None:
    assert companion_of(replace(PLAIN, cgroup=Cgroup("a.slice", 1)), chooses_sockets=True) is None


def test_without_sk_lookup_everything_that_arrives_is_left_to_the_table() -> None:
    excluded = replace(PLAIN, inbound=Inbound(exclude_ports=(PortRange(22),)))
    table = text(excluded, chooses_sockets=False)
    assert table.startswith(f"table {TABLE} {{")
    assert "i6: excluded ports" in table
    assert "hook output" not in table
    assert companion_of(replace(PLAIN, inbound=Inbound(enabled=False)), chooses_sockets=False) is None
    programs = [program.name for program in plan_for(excluded, chooses_sockets=False).programs]
    assert "sk_lookup" not in programs
    assert "connect4" in programs


def test_containers_ports_are_redirected_for_others_as_any_port_is() -> None:
    with_docker = replace(PLAIN, virtual_networks=DOCKER)
    table = text(with_docker)
    assert "i2: leaves docker0" in table
    assert "elements = { 15001 }" in table
    assert "i5: included ports" in table
    spared = replace(with_docker, inbound=Inbound(exclude_ports=(PortRange(15001),)))
    assert "i5" not in text(spared)


def test_the_table_knows_no_zones_and_no_outbound_rules() -> None:
    busy = replace(PLAIN, virtual_networks=DOCKER, drop_invalid=True, outbound=Outbound(exclude_ports=(PortRange(1),)))
    table = text(busy)
    assert "ct zone" not in table
    assert "excluded_outbound_ports" not in table
    assert "ct state invalid" in table


def test_bypass_is_refused_for_what_the_table_redirects() -> None:
    bypass = replace(PLAIN, when_proxy_down=WhenProxyDown.BYPASS)
    dropping = plan_for(replace(bypass, drop_invalid=True)).companion
    assert dropping is not None
    assert dropping.purposes == (INVALID_PACKETS,)
    with pytest.raises(InputError, match="virtual networks"):
        plan_for(replace(bypass, virtual_networks=DOCKER))
    with pytest.raises(InputError, match="connections that arrive"):
        plan_for(bypass, chooses_sockets=False)


def test_the_plan_shows_the_table_and_what_for() -> None:
    shown = plan_for(replace(PLAIN, virtual_networks=DOCKER, cgroup=Cgroup("app.slice", 1))).render()
    assert "# nf_tables, for virtual networks\n" in shown
    assert "program connect4 on the cgroup app.slice" in shown
