"""`tpctl check` that is not allowed to do what it needs, or is killed: nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.netns.lab import run, tpctl
from tests.netns.probed import ENGINES, INSTALL, begun, capture, checked, devices, everything, net, on_its_own
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import Net, until
from tpctl.rehearsal import cgroup

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("on_its_own")]
__all__ = ["net", "on_its_own"]


def test_what_cannot_be_probed_fails_no_install(net: Net) -> None:
    with net.inside(net.host):
        bare = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-m", "tpctl.cli.main"]
        done = run([*bare, *INSTALL, "--engine", "iptables", "--iptables-mode", "nft"], check=False)
        assert done.returncode == 0, done.stderr
        assert "note: no probe could be sent: every direction: unshare: Operation not permitted" in done.stderr
        done = run([*bare, "check"], check=False)
        assert done.returncode == 0
        assert "not probed" in done.stdout
        tpctl("uninstall")


def test_a_policy_for_another_control_group(net: Net) -> None:
    with cgroup.own_groups() as groups, net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], "--cgroup", groups.service.path)
        fates, document = checked()
        assert fates == {}
        assert len(document["notProbed"]) == 4
        assert all(groups.service.path in line for line in document["notProbed"])
        with groups.inside(groups.service.path):
            fates, document = checked()
        assert {name.split()[0] for name in fates} == {"outbound", "DNS"}, document
        assert set(fates.values()) == {"refused"}
        tpctl("uninstall")


@pytest.mark.parametrize("point", range(3))
def test_a_check_that_is_killed_at_any_point(net: Net, point: int, tmp_path: Path) -> None:
    """All of it takes some 20 ms, after a start of some 100: where one run ends depends on the machine."""
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], "--no-probe")
        before = everything()
        command = subprocess.Popen([sys.executable, "-m", "tpctl.cli.main", "check"], stdout=subprocess.DEVNULL)
        while not devices() and command.poll() is None:
            pass
        time.sleep(point * 0.006)
        command.kill()
        command.wait()
        until(lambda: not devices() and everything() == before)
        tpctl("uninstall")


@pytest.mark.parametrize("whom", ["command", "child", "both"])
def test_nothing_is_left_of_a_check_that_is_killed(net: Net, whom: str, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], "--no-probe")
        run(["iptables", "-w", "-A", "INPUT", "-p", "tcp", "--dport", "15006", "-j", "DROP"])  # so that it takes long
        before = everything()
        command, child = begun()
        assert devices()
        with capture("eth0") as left:
            if whom != "child":
                command.kill()
            if whom != "command":
                os.kill(child, signal.SIGKILL)
            command.wait()
            until(lambda: not devices() and everything() == before)
        if whom != "both":  # else the data plane may call on what it has just taken, and nobody is left to answer
            assert left == []
        tpctl("uninstall")
