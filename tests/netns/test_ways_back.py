"""What an uninstall leaves for connections goes by itself, and ::6 that came with kumactl's rules goes with them."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.netns.lab import APP, PROXY, PROXY_USER, bare_namespace, loopback_addresses, run, tpctl
from tests.swap import kumactl
from tpctl.change import finishing
from tpctl.host.proc import read_net
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--iptables-mode", "nft"),
    "iptables legacy": ("--iptables-mode", "legacy"),
}
INSTALL = ("install", "--kuma-dp-user", PROXY_USER)
PATIENCE_SECONDS = 120.0
LISTENS = 1 << 16
"""__SO_ACCEPTCON (include/linux/net.h) in the flags of /proc/net/unix."""

engine = pytest.mark.parametrize("flags", ENGINES.values(), ids=ENGINES)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        yield made


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def address() -> str:
    """The address ::6 on lo, as ip shows it, or nothing."""
    return next((line for line in loopback_addresses().splitlines() if " ::6/128 " in line), "")


def waits() -> int:
    """How many processes wait for connections in this network namespace."""
    sockets = (line.split() for line in read_net("unix").splitlines())
    return sum(one[-1] == f"@{finishing.PLACE[1:]}" and int(one[3], 16) & LISTENS != 0 for one in sockets)


@contextmanager
def redirected(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of an application's through the data plane."""
    with lab.inside(HOST, PROXY):
        listening = socket.create_server(("0.0.0.0", 15001))
    with listening, lab.inside(HOST, APP):
        near = socket.create_connection(("203.0.113.7", 8080), timeout=60)
        far, _ = listening.accept()
    far.settimeout(60)
    with near, far:
        yield near, far


def works(near: socket.socket, far: socket.socket) -> bool:
    near.sendall(b"x")
    return far.recv(1) == b"x"


@engine
def test_what_connections_need_goes_when_they_end(lab: Lab, flags: tuple[str, ...]) -> None:
    """And no command of tpctl's is needed for that."""
    with lab.inside(HOST):
        before = run(["nft", "list", "tables"]).stdout
        tpctl(*INSTALL, *flags)
    with redirected(lab) as (near, far), lab.inside(HOST):
        assert "and goes after that" in tpctl("uninstall").stderr
        tpctl("uninstall")
        until(lambda: waits() == 1)
        time.sleep(2 * finishing.FIRST_SECONDS)  # in which it looks
        assert "inet tpctl" in run(["nft", "list", "tables"]).stdout
        assert works(near, far)
        assert waits() == 1, "each uninstall has left somebody who waits"
    with lab.inside(HOST):
        until(lambda: run(["nft", "list", "tables"]).stdout == before)
        until(lambda: waits() == 0)


def test_status_counts_them_while_another_tpctl_works(lab: Lab) -> None:
    """Such as the one that waits for them."""
    with lab.inside(HOST):
        tpctl(*INSTALL)
    with redirected(lab) as (near, far), lab.inside(HOST):
        tpctl("uninstall")
        with state.locked():
            assert '"draining": 1' in tpctl("status", "--json", check=False).stdout
        assert works(near, far)


def test_an_install_takes_over_from_who_waits(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL)
    with redirected(lab) as (near, far), lab.inside(HOST):
        tpctl("uninstall")
        until(lambda: waits() == 1)
        tpctl(*INSTALL)
        until(lambda: waits() == 0)
        assert works(near, far)
        assert '"draining": 0' in tpctl("status", "--json", check=False).stdout
        tpctl("uninstall")


@contextmanager
def dialled() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of the data plane's to an application, from ::6."""
    own = str(HOST_ADDRESS[Family.IPV6])
    with socket.create_server((own, 8082), family=socket.AF_INET6) as listening:
        near = socket.create_connection((own, 8082), timeout=60, source_address=("::6", 0))
        far, _ = listening.accept()
    far.settimeout(60)
    with near, far:
        yield near, far


@pytest.mark.parametrize("migrated", [False, True])
def test_the_address_goes_when_connections_from_it_end(lab: Lab, migrated: bool) -> None:
    with lab.inside(HOST):
        if migrated:
            as_kumactl_leaves_it("nft")
        tpctl(*INSTALL)
        with dialled() as (near, far):
            assert "1 connection runs from ::6" in tpctl("uninstall").stderr
            until(lambda: waits() == 1)
            time.sleep(2 * finishing.FIRST_SECONDS)
            assert address()
            assert works(near, far)
        until(lambda: not address())
        until(lambda: waits() == 0)


def as_kumactl_leaves_it(variant: str) -> None:
    """kumactl's rules of both families, and the address that it adds."""
    for tool, family in (("iptables", Family.IPV4), ("ip6tables", Family.IPV6)):
        run([f"{tool}-{variant}-restore", "--noflush"], stdin=kumactl.ruleset(family))
    run(["ip", "-6", "address", "add", "::6/128", "dev", "lo"])


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize("families", ["dualstack", "ipv4"])
def test_the_address_of_a_migrated_host_goes_with_the_uninstall(variant: str, families: str) -> None:
    with bare_namespace() as space, space.inside():
        as_kumactl_leaves_it(variant)
        tpctl(*INSTALL, "--ip-family-mode", families)
        assert bool(address()) == (families == "dualstack")
        assert ("would remove the address ::6" in tpctl("uninstall", "--dry-run").stdout) == bool(address())
        tpctl("uninstall")
        assert not address()


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_an_uninstall_of_kumactls_rules_takes_the_address_that_they_wanted(variant: str) -> None:
    with bare_namespace() as space, space.inside():
        as_kumactl_leaves_it(variant)
        assert "would remove the address ::6 on lo" in tpctl("uninstall", "--dry-run").stdout
        assert address()
        tpctl("uninstall")
        assert not address()


def test_an_address_that_was_there_without_kumactls_rules_stays() -> None:
    with bare_namespace() as space, space.inside():
        run(["ip", "-6", "address", "add", "::6/128", "dev", "lo"])
        before = address()
        run(["iptables-nft-restore", "--noflush"], stdin=kumactl.ruleset(Family.IPV4))  # these do not want it
        tpctl(*INSTALL)
        tpctl("uninstall")
        assert address() == before
        tpctl("uninstall")
        assert address() == before


@pytest.mark.parametrize("families", ["dualstack", "ipv4"])
def test_a_rollback_brings_the_address_back_as_it_was(families: str) -> None:
    with bare_namespace() as space, space.inside():
        as_kumactl_leaves_it("nft")
        before = address(), run(["ip6tables-nft-save", "-t", "nat"]).stdout.splitlines()[1:-1]
        tpctl(*INSTALL, "--ip-family-mode", families, "--confirm-within", "600s")
        assert "installed now: kumactl's rules (nft)" in tpctl("rollback").stdout
        assert (address(), run(["ip6tables-nft-save", "-t", "nat"]).stdout.splitlines()[1:-1]) == before
        tpctl("uninstall")
        assert not address()


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_an_install_that_fails_brings_kumactls_rules_back(variant: str) -> None:
    """Here it fails at the last step, when they are gone."""
    broken = (
        "from tpctl.record import state; from tpctl.cli.main import main\n"
        "def finish(renewal): raise state.ApplyError('the disk is gone')\n"
        "state.Renewal.finish = finish; main()"
    )
    with bare_namespace() as space, space.inside():
        as_kumactl_leaves_it(variant)

        def rules() -> list[str]:
            saved = (run([f"{tool}-{variant}-save"]).stdout for tool in ("iptables", "ip6tables"))
            return [line for text in saved for line in text.splitlines() if line.startswith("-A")]

        before = rules(), address()
        done = run([sys.executable, "-c", broken, *INSTALL, "--engine", "nftables"], check=False)
        assert done.returncode == 1
        assert "the disk is gone. Everything was rolled back: the host is as it was before" in done.stderr
        assert (rules(), address()) == before
        assert "inet tpctl" not in run(["nft", "list", "tables"]).stdout
        tpctl("uninstall")
