"""The unit that restores the order after restarts of other software; the boot with all of it has no ordering cycle."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.persist.test_systemd import analyzed, machine, program, root, tree
from tpctl.persist import neighbours, systemd

__all__ = ["machine", "root"]

ORDERING = {
    "docker.service": "After=network-online.target firewalld.service\nWants=network-online.target",
    "podman-restart.service": "After=network-online.target\nWants=network-online.target",
    "kubelet.service": "After=network-online.target\nWants=network-online.target",
    "k3s.service": "After=network-online.target\nWants=network-online.target",
    "tailscaled.service": "After=network-pre.target systemd-networkd.service\nWants=network-pre.target",
    "firewalld.service": "Before=network-pre.target\nWants=network-pre.target\nAfter=dbus.service polkit.service",
    "ufw.service": "DefaultDependencies=no\nBefore=network-pre.target\nWants=network-pre.target\nAfter=local-fs.target",
    "nftables.service": "DefaultDependencies=no\nBefore=network-pre.target shutdown.target\nWants=network-pre.target",
    "netfilter-persistent.service": "DefaultDependencies=no\nBefore=network-pre.target\nWants=network-pre.target",
    "libvirtd.service": "After=network.target dbus.service",
    "fail2ban.service": "After=network.target iptables.service firewalld.service ufw.service nftables.service",
    "application.service": "After=network-online.target\nWants=network-online.target",
}
"""What the units of Debian and upstream say of the order, and one that needs the redirection when it starts."""


def cycles(machine: Path) -> list[str]:
    """What systemd finds wrong with the order of a whole boot."""
    for name, text in ORDERING.items():
        unit = machine / "usr/lib/systemd/system" / name
        unit.unlink(missing_ok=True)
        unit.write_text(f"[Unit]\n{text}\n[Service]\nExecStart=/bin/kill\n")
        link = machine / "etc/systemd/system/multi-user.target.wants" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"/usr/lib/systemd/system/{name}")
    argv = ["systemd-analyze", "verify", "--man=no", f"--root={machine}", "multi-user.target"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if "cycle" in line]


@analyzed
def test_a_boot_with_everybody_has_no_cycle(machine: Path) -> None:
    assert cycles(machine) == []


@analyzed
def test_a_cycle_is_found(machine: Path) -> None:
    """So that the silence above means something: the service itself cannot come after Docker."""
    unit = machine / "etc/systemd/system" / systemd.SERVICE
    unit.write_text(unit.read_text().replace("[Service]", "After=docker.service\n[Service]", 1))
    assert cycles(machine)


@analyzed
def test_a_start_of_docker_starts_it_afterwards(machine: Path) -> None:
    cycles(machine)
    argv = ["systemd-analyze", f"--root={machine}", "verify", "--man=no", neighbours.SERVICE, "docker.service"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "tpctl" in line]) == (0, [])
    link = machine / "etc/systemd/system/docker.service.wants" / neighbours.SERVICE
    assert str(link.readlink()) == f"/etc/systemd/system/{neighbours.SERVICE}"


@pytest.mark.parametrize("name", ["docker", "podman", "kubelet", "ufw", "firewalld", "tailscaled", "systemd-networkd"])
def test_it_comes_after_and_with(root: Path, name: str) -> None:
    program(root, "usr/bin/tpctl")
    before = tree(root)
    systemd.install(root, command="/usr/bin/tpctl")
    text = (root / systemd.UNITS / neighbours.SERVICE).read_text()
    after = " ".join(line for line in text.splitlines() if line.startswith("After="))
    assert f"{name}.service" in after
    assert (root / systemd.UNITS / f"{name}.service.wants" / neighbours.SERVICE).is_symlink()
    systemd.remove(root)
    assert not [name for name in tree(root) if name not in before and "tpctl" in name]
    assert not (root / systemd.UNITS / f"{name}.service.wants").exists()
