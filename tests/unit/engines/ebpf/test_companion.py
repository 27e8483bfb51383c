"""What is left to the table of nf_tables beside the programs."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from tpctl.engines.ebpf.companion import GUARD, INVALID_PACKETS, TABLE, companion_of
from tpctl.engines.ebpf.plan import plan_for
from tpctl.spec.policy import (
    Cgroup,
    Dns,
    DnsCapture,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    VirtualNetwork,
    WhenProxyDown,
)
from tpctl.system.errors import InputError

PLAIN = Policy(5678, dns=Dns(DnsCapture.ALL))
DOCKER = (VirtualNetwork("docker0", ip_network("172.17.0.0/16")),)


def text(policy: Policy, *, chooses_sockets: bool = True) -> str:
    """The table, or nothing."""
    companion = companion_of(policy, chooses_sockets=chooses_sockets)
    return companion.plan.render() if companion else ""


def test_the_programs_alone_do_what_only_sockets_see() -> None:
    assert companion_of(PLAIN, chooses_sockets=True) is None
    unguarded = replace(PLAIN, guard_ports=False)
    assert companion_of(replace(unguarded, cgroup=Cgroup("a.slice", 1)), chooses_sockets=True) is None


def test_the_programs_guard_what_they_see_and_the_table_the_rest() -> None:
    assert "guard" not in text(replace(PLAIN, drop_invalid=True))
    for policy, chooses_sockets in (
        (replace(PLAIN, virtual_networks=DOCKER), True),
        (replace(PLAIN, inbound=Inbound(enabled=False)), False),
    ):
        table = text(policy, chooses_sockets=chooses_sockets)
        assert "chain guard_input" in table
        assert "guard_own" not in table, "the programs change destinations before that"
    elsewhere = text(replace(PLAIN, virtual_networks=DOCKER, inbound=Inbound(port=16006)))
    assert "elements = { 15001, 15053, 16006 }" in elsewhere
    of_one_service = text(replace(PLAIN, cgroup=Cgroup("a.slice", 1)))
    spared, owner = (of_one_service.index(part) for part in ('socket cgroupv2 level 1 "a.slice"', "meta skuid 5678"))
    assert spared < owner
    assert "chain guard_output" in of_one_service


def test_without_sk_lookup_everything_that_arrives_is_left_to_the_table() -> None:
    excluded = replace(PLAIN, inbound=Inbound(exclude_ports=(PortRange(22),)))
    table = text(excluded, chooses_sockets=False)
    assert table.startswith(f"table {TABLE} {{")
    assert "i6: excluded ports" in table
    assert "hook output" not in table
    outbound_only = replace(PLAIN, inbound=Inbound(enabled=False), guard_ports=False)
    assert companion_of(outbound_only, chooses_sockets=False) is None
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
    with pytest.raises(InputError, match="inbound connections"):
        plan_for(bypass, chooses_sockets=False)


def test_the_plan_shows_the_table_and_what_for() -> None:
    shown = plan_for(replace(PLAIN, virtual_networks=DOCKER, cgroup=Cgroup("app.slice", 1))).render()
    assert f"# nf_tables, for virtual networks, {GUARD}\n" in shown
    assert "program connect4 on the cgroup app.slice" in shown
