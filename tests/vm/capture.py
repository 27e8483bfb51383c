"""What the scenarios ask of a machine: where connections end, and what there is of tpctl's."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.vm.machine import Machine

POLICY = "/root/policy.json"
FLAGS = "--kuma-dp-user kuma-dp --redirect-dns --exclude-inbound-ports 22,9100 --exclude-outbound-ports 9200"
DATA_PLANE = (15006, 15001, 15053)
CONFIG = "/etc/tpctl/config.yaml"
UNTIL_FIREWALLD_RUNS = "until firewall-cmd --state; do sleep 0.2; done"
"""systemd is content with its name on the bus; its rules come later."""
FIREWALLD = f"systemctl restart firewalld && {UNTIL_FIREWALLD_RUNS}"
LET_IPV6_PASS = "sed -i 's/^RFC3964_IPv4=.*/RFC3964_IPv4=no/' /etc/firewalld/firewalld.conf"
"""What `status` asks for: with its defaults firewalld rejects redirected IPv6 connections of the host."""
_WORLD = {
    "nftables": "nft --stateless list ruleset",
    "legacy IPv4": "iptables-legacy-save | grep -v '^#' | sed 's/\\[.*//'",
    "legacy IPv6": "ip6tables-legacy-save | grep -v '^#' | sed 's/\\[.*//'",
    "addresses": "{ ip -oneline address show scope global; ip -oneline address show dev lo; } "
    "| sed 's/ tentative//; s/valid_lft.*//'",
    "policy routing": "ip rule; ip -6 rule; ip route show table all type local; ip route show default",
    "files": "find /etc/systemd /etc/firewalld /etc/tpctl /run/tpctl /usr/lib/systemd/system "
    "! -type d ! -name '*.old' -exec md5sum {} + 2>/dev/null | sort -k2",
    "BPF file system": "find /sys/fs/bpf -mindepth 1 ! -path '*/systemd*'",
    "units": "systemctl list-unit-files --no-legend '*tpctl*'; systemctl list-units --all --no-legend '*tpctl*'",
}


@dataclass(frozen=True, slots=True)
class Capture:
    """Where connections that were tried have ended."""

    connections: int
    wrong: list[str]
    ended: dict[str, int]


def remember_policy(machine: Machine) -> None:
    """Keep what is installed now, for `probe`."""
    policy = machine.status()["policy"]
    assert policy
    machine.write(POLICY, json.dumps(policy))


def probe(machine: Machine) -> Capture:
    """Try every kind of connection there is for the policy of `remember_policy`. Runs nothing of tpctl's commands."""
    return Capture(**json.loads(machine.said(f"/opt/tpctl/bin/python /root/probing.py {POLICY}")))


def assert_captured(machine: Machine) -> None:
    """Each connection ends where `decide()` says, and each part of the data plane has some."""
    found = probe(machine)
    assert found.wrong == [], "\n".join(found.wrong)
    for port in DATA_PLANE:
        assert found.ended.get(f"host:{port}"), found.ended


def write_config(machine: Machine, flags: str) -> None:
    """Make these flags what the units install."""
    machine.run(f"mkdir -p /etc/tpctl && tpctl install {flags} --print-config > {CONFIG}")


def world(machine: Machine) -> dict[str, str]:
    """Everything that tpctl could have changed, except a configuration that is its owner's."""
    machine.run(f"! systemctl is-active --quiet firewalld || {UNTIL_FIREWALLD_RUNS}")
    found = {name: machine.run(command, check=False).stdout for name, command in _WORLD.items()}
    found["files"] = "\n".join(line for line in found["files"].splitlines() if CONFIG not in line)
    return found


def start_firewalld(machine: Machine) -> None:
    """Run firewalld now and at every boot, with a zone that refuses nothing: what is not redirected is reached."""
    machine.run(LET_IPV6_PASS)
    machine.run(f"firewall-offline-cmd --set-default-zone=trusted && systemctl enable --quiet firewalld && {FIREWALLD}")
