"""Changes that were interrupted while they awaited confirmation, and commands that meet another one half-way."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.netns.kumactl_host import KUMA_RULES
from tests.netns.lab import PROXY, PROXY_USER, run, snapshot, tpctl
from tpctl.change import confirm, loopback
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout
from tpctl.spec.policy import Policy, PortRange

pytestmark = pytest.mark.root

INSTALL = ("install", "--kuma-dp-user", PROXY_USER, "--engine", "nftables")
OTHER = (*INSTALL, "--exclude-inbound-ports", "80")
LONG = ("--confirm-within", "600s")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        made.serve_data_plane(Policy(PROXY))
        yield made
        with made.inside(HOST):
            tpctl("uninstall")


def refused(*argv: str) -> str:
    done = tpctl(*argv, check=False)
    assert done.returncode == 2, done
    return done.stderr


def test_an_uninstall_that_was_interrupted_cannot_be_confirmed(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL)
        before, record = snapshot(counters=False), state.path().read_text()
        tpctl("uninstall", *LONG)
        state.path().write_text(record)  # it goes last
        assert "tpctl rollback" in refused("confirm")
        tpctl("rollback")
        assert snapshot(counters=False) == before


def test_an_uninstall_of_kumactls_rules_that_was_interrupted_cannot_be_confirmed(lab: Lab) -> None:
    with lab.inside(HOST):
        run(["iptables-nft-restore", "--noflush"], stdin=KUMA_RULES)
        tpctl("uninstall", *LONG)
        run(["iptables-nft", "-t", "nat", "-N", "KUMA_MESH_INBOUND"])
        assert "tpctl rollback" in refused("confirm")
        run(["iptables-nft", "-t", "nat", "-X", "KUMA_MESH_INBOUND"])
        assert "confirmed" in tpctl("confirm").stdout


def test_an_install_that_was_interrupted_before_its_record_cannot_be_confirmed(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL)
        record = state.path().read_text()
        tpctl(*OTHER, *LONG)
        pending = confirm.path().read_text()
        tpctl("rollback")
        confirm.path().write_text(pending)
        assert state.path().read_text() == record
        assert "tpctl rollback" in refused("confirm")
        assert "awaits confirmation" in refused(*OTHER)
        assert "unchanged" in tpctl(*INSTALL).stdout
        assert confirm.load() is None, "what stood there before is there again"
        assert "no change awaits confirmation" in refused("confirm")


def test_an_install_whose_way_back_was_interrupted_cannot_be_confirmed(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *LONG)
        pending = confirm.path().read_text()
        tpctl("rollback")
        confirm.path().parent.mkdir(parents=True)
        confirm.path().write_text(pending)
        assert "tpctl rollback" in refused("confirm")
        assert "installed now: nothing" in tpctl("rollback").stdout


def test_a_way_back_whose_record_stays_says_that_it_was_gone(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *LONG)
        run(["mount", "--bind", str(confirm.path()), str(confirm.path())])
        try:
            done = tpctl("rollback", check=False)
        finally:
            run(["umount", str(confirm.path())])
        assert done.returncode == 1
        assert "the install was taken back; installed now: nothing. The record" in done.stderr
        tpctl("rollback")
        assert confirm.load() is None


def made_overdue(seconds: float) -> None:
    """The pending change, as if its time had been up so long, with nobody there to take it back."""
    document = json.loads(confirm.path().read_text())
    confirm.path().write_text(json.dumps({**document, "deadline": document["deadline"] - 600 - seconds}))


def test_what_nobody_took_back_in_time_is_taken_back_by_the_next_install(lab: Lab) -> None:
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL, *LONG)
        made_overdue(1)
        assert "awaits confirmation" in refused(*OTHER), "a guardian may be on its way"
        made_overdue(600)
        assert "installed then: nothing" in tpctl(*OTHER).stderr
        record = state.load()
        assert record
        assert PortRange(80) in record.policy.inbound.exclude_ports
        assert confirm.load() is None
        tpctl("uninstall")
        assert snapshot(counters=False) == before


def test_what_nobody_took_back_in_time_is_taken_back_by_the_next_apply(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL)
        record, before = state.path().read_text(), snapshot(counters=False)
        tpctl(*OTHER, *LONG)
        made_overdue(600)
        done = tpctl("apply")
        assert "an earlier install was not confirmed in time" in done.stderr
        assert "nothing was changed" in done.stdout
        assert (state.path().read_text(), snapshot(counters=False)) == (record, before)
        tpctl("uninstall")


def test_what_nobody_took_back_in_time_and_cannot_be(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *LONG)
        made_overdue(600)
        run(["mount", "--bind", str(confirm.path()), str(confirm.path())])
        try:
            done = tpctl(*OTHER, check=False)
        finally:
            run(["umount", str(confirm.path())])
        assert done.returncode == 1
        assert "an earlier install was not confirmed in time, and to take it back first failed" in done.stderr
        assert "Nothing else was done" in done.stderr
        assert "installed then: nothing" in tpctl(*OTHER).stderr
        tpctl("uninstall")


def test_status_leaves_alone_what_another_tpctl_is_about_to_need(lab: Lab) -> None:
    """An install adds ::6 before its rules, and a leftover looks the same; so does status know by the lock."""
    with lab.inside(HOST):
        with state.locked():
            loopback.add("lo")
            tpctl("status", "--json", check=False)
            assert loopback.present("lo")
        tpctl("status", "--json", check=False)
        assert not loopback.present("lo")
