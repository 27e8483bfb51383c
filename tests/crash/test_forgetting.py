"""Killed, or failing, while conntrack is told to forget connections that are over: only here these calls are points.

How many there are depends on what conntrack remembers, which is the same in every run here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.crash.points import FORGETTING
from tests.crash.scene import Done, Scene, scene
from tests.crash.server import FAIL_ONCE, KILL_CALLER, Fault
from tests.netns.lab import run
from tpctl.host import conntrack
from tpctl.rehearsal.cgroup import own_place
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER_ADDRESS
from tpctl.spec.policy import Family

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy", "conntrack")]

PORTS = (41001, 41002)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with own_place() as place, scene("nftables", place, tmp_path_factory.mktemp("scene")) as made:
        yield made


def begin(host: Scene) -> None:
    """Something is installed, and conntrack remembers connections that are over."""
    host.install("old")
    with host.lab.inside(HOST):
        for family in Family:
            for port in PORTS:
                ends = ["-s", str(PEER_ADDRESS[family]), "-d", str(HOST_ADDRESS[family])]
                run(["conntrack", "-I", "-p", "tcp", *ends, "--sport", str(port), "--dport", "8080",
                     "--state", "ESTABLISHED", "-u", "SEEN_REPLY", "-t", "300"])  # fmt: skip
    assert remembered(host) == 2 * len(PORTS)


def remembered(host: Scene) -> int:
    """How many of these it has not forgotten."""
    with host.lab.inside(HOST):
        return sum(entry.original.source_port in PORTS for entry in conntrack.entries())


def interfere(host: Scene, how: str, *argv: str) -> Done:
    """Run a command with a fault at the second of these connections."""
    begin(host)
    undisturbed = host.host(*argv, forgetting=True)
    assert (undisturbed.exit, remembered(host)) == (0, 0)
    host.uninstall()
    _, second, *_ = (at for at, point in enumerate(undisturbed.points, 1) if point.endswith(FORGETTING))
    begin(host)
    done = host.host(*argv, faults=[Fault(how, second, errno.EIO)], forgetting=True)
    assert done.hit
    assert done.hit.endswith(FORGETTING)
    return done


def test_killed_in_the_middle_the_next_install_forgets_the_rest(host: Scene) -> None:
    assert interfere(host, KILL_CALLER, *host.argv("new")).exit < 0
    assert remembered(host) == 2 * len(PORTS) - 1
    assert host.seen() == host.expected("new")
    assert any("interrupted" in problem for problem in host.complaints())
    host.install("new")
    assert remembered(host) == 0
    assert host.seen() == host.expected("new")
    assert host.complaints() == []
    host.uninstall()
    assert host.held() == host.base


def test_killed_in_the_middle_the_next_uninstall_forgets_the_rest(host: Scene) -> None:
    assert interfere(host, KILL_CALLER, "uninstall").exit < 0
    assert remembered(host) == 2 * len(PORTS) - 1
    assert host.seen() == host.expected("none")
    host.uninstall()
    assert remembered(host) == 0
    assert host.held() == host.base


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_one_that_the_kernel_does_not_forget_stops_nothing(host: Scene, command: str) -> None:
    argv = host.argv("new") if command == "install" else (command,)
    done = interfere(host, FAIL_ONCE, *argv)
    assert done.exit == 0, str(done)
    assert remembered(host) == 1
    assert host.seen() == host.expected("new" if command == "install" else "none")
    assert host.complaints() == []
    host.uninstall()
    assert host.held() == host.base
