"""`tpctl persist --systemd` under a real systemd: whatever way resolv.conf changes, the redirection of DNS follows."""

from __future__ import annotations

import pytest

from tests.vm.capture import CONFIG, FLAGS, write_config
from tests.vm.conftest import in_the_matrix
from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, in_the_matrix]

WRITTEN = "echo nameserver {server} > {file}"
RENAMED = "echo nameserver {server} > {file}.new && mv {file}.new {file}"
GONE_FOR_A_WHILE = "rm {file}; sleep 3; echo nameserver {server} > {file}"
LINKED_ANEW = "echo nameserver {server} > /run/second && ln -s /run/second {file}.new && mv -T {file}.new {file}"


def servers(machine: Machine) -> list[str]:
    """The name servers whose queries are redirected."""
    found: list[str] = machine.status()["policy"]["dns"]["servers"]
    return found


def assert_follows(machine: Machine, change: str, file: str, server: str) -> None:
    """The change makes queries to that server, and to no other, redirected, and `status` has nothing to say of it."""
    machine.run(change.format(server=server, file=file))
    machine.wait_for(lambda: servers(machine) == [server], f"queries to {server} are not redirected after: {change}")
    assert "verdict: redirect" in machine.tpctl(f"explain dns --uid app --to {server}").stdout
    status = machine.status()
    assert status["drift"] == []
    assert "name server" not in str(status["problems"])


def start(machine: Machine) -> None:
    write_config(machine, FLAGS)
    assert "redirect" in machine.said(f"cat {CONFIG}")
    machine.tpctl("persist --systemd")
    machine.run("systemctl start tpctl")
    assert machine.said("systemctl is-active tpctl-resolv.path") == "active"


def test_a_file(machine: Machine) -> None:
    machine.run("rm -f /etc/resolv.conf; echo nameserver 192.0.2.1 > /etc/resolv.conf")
    start(machine)
    assert servers(machine) == ["192.0.2.1"]
    for number, change in enumerate((WRITTEN, RENAMED, GONE_FOR_A_WHILE, WRITTEN), 2):
        assert_follows(machine, change, "/etc/resolv.conf", f"192.0.2.{number}")
    machine.run("systemctl stop tpctl")
    assert machine.said("systemctl is-active tpctl-resolv.path; true") == "inactive"
    assert machine.status()["installed"] is False


def test_a_link(machine: Machine) -> None:
    machine.run("echo nameserver 192.0.2.1 > /run/first; rm -f /etc/resolv.conf; ln -s /run/first /etc/resolv.conf")
    start(machine)
    for number, change in enumerate((WRITTEN, RENAMED), 2):
        assert_follows(machine, change, "/run/first", f"192.0.2.{number}")
    assert_follows(machine, LINKED_ANEW, "/etc/resolv.conf", "192.0.2.4")
