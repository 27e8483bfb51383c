"""Real reboots: what was installed is there again before anybody types a command, and what was removed stays away."""

from __future__ import annotations

import pytest

from tests.vm.capture import (
    FIREWALLD,
    FLAGS,
    LET_IPV6_PASS,
    assert_captured,
    remember_policy,
    start_firewalld,
    world,
    write_config,
)
from tests.vm.conftest import in_the_matrix
from tests.vm.machine import Machine

pytestmark = pytest.mark.root


def rules(machine: Machine) -> list[str]:
    """Everything of ours in the kernel, sorted, without counters; firewalld's chains for direct rules are built in."""
    listing = machine.said("nft --stateless list table inet tpctl 2>/dev/null; iptables-save; ip6tables-save")
    ours = [line.replace("_direct", "") for line in listing.splitlines() if "TPCTL_" in line or "tpctl/" in line]
    return sorted(line.split("[")[0] for line in ours)


def assert_gone(machine: Machine, before: dict[str, str]) -> None:
    """Uninstall and reboot: everything is as it was, and says so."""
    machine.tpctl("uninstall")
    machine.reboot()
    after = world(machine)
    assert after == before
    status = machine.status()
    assert (status["installed"], status["nextBoot"], status["problems"]) == (False, [], [])


def assert_survives_firewalld(machine: Machine) -> None:
    """Whatever firewalld does, there is one copy of each rule, and the rules do what they did."""
    wanted = rules(machine)
    assert wanted
    for action in ("firewall-cmd --reload", "firewall-cmd --complete-reload", FIREWALLD):
        machine.run(action)
        assert rules(machine) == wanted, action
    assert machine.status()["drift"] == []
    assert_captured(machine)


def assert_captured_after_reboot(machine: Machine) -> None:
    """What is installed now is at work at the first moment after a boot."""
    remember_policy(machine)
    machine.reboot()
    assert_captured(machine)


def test_firewalld_brings_the_rules_back(machine: Machine) -> None:
    start_firewalld(machine)
    before = world(machine)
    machine.tpctl(f"install {FLAGS} --engine iptables --store-firewalld")
    assert_captured_after_reboot(machine)
    assert_gone(machine, before)


@in_the_matrix
def test_firewalld_keeps_one_copy_of_each_rule(machine: Machine) -> None:
    start_firewalld(machine)
    machine.tpctl(f"install {FLAGS} --engine iptables --store-firewalld")
    remember_policy(machine)
    assert_survives_firewalld(machine)


@in_the_matrix
@pytest.mark.parametrize("engine", ["nftables", "iptables"])
def test_the_unit_brings_the_rules_back(machine: Machine, engine: str) -> None:
    if engine == "iptables":  # with this backend firewalld flushes all tables when it starts
        machine.run("sed -i 's/^FirewallBackend=.*/FirewallBackend=iptables/' /etc/firewalld/firewalld.conf")
    start_firewalld(machine)
    before = world(machine)
    write_config(machine, f"{FLAGS} --engine {engine}")
    machine.tpctl("persist --systemd")
    machine.run("systemctl start tpctl")
    assert "tpctl.service" in machine.status()["nextBoot"][0]
    assert_captured_after_reboot(machine)
    assert machine.said("systemctl is-active tpctl") == "active"
    assert machine.status()["engine"] == engine
    if engine == "nftables":  # firewalld's reloads are no concern of its table
        assert_survives_firewalld(machine)
    assert_gone(machine, before)


@in_the_matrix
def test_firewalld_that_rejects_redirected_ipv6_is_named(machine: Machine) -> None:
    machine.run(FIREWALLD)
    done = machine.tpctl(f"install {FLAGS} --engine nftables")
    if "ct status dnat accept" in machine.run("nft list chain inet firewalld filter_OUTPUT").stdout:  # firewalld 2
        assert "rule of firewalld" not in done.stderr
        assert "RFC3964_IPv4" not in " ".join(machine.status()["problems"])
        assert "Connection refused" in connecting(machine)
        return
    assert "warning: a rule of firewalld rejects redirected connections" in done.stderr
    assert "RFC3964_IPv4=no" in " ".join(machine.status()["problems"])
    assert "No route to host" in connecting(machine)
    machine.run(f"{LET_IPV6_PASS} && firewall-cmd --reload")
    assert "RFC3964_IPv4=no" not in " ".join(machine.status()["problems"])
    assert "Connection refused" in connecting(machine)  # it was redirected, and nobody listens there


def connecting(machine: Machine) -> str:
    """What an application hears that calls a neighbour by IPv6 who does not exist."""
    return machine.run("runuser -u app -- bash -c 'exec 3<>/dev/tcp/fd15::99/80'", check=False).stderr
