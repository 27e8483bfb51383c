"""A few seconds of the long run, and how it judges."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extent import takes_long
from tests.netns.lab import APP
from tests.soak.plant import REMOTES, Plant, plant
from tests.soak.run import soak
from tests.soak.samples import Verdict, judge
from tests.soak.traffic import ECHO, PORT, THROUGH, Window, _exactly
from tpctl.rehearsal.layout import HOST

SECONDS = 20.0
LEAST = 5
"""The engine is swapped, and the relay replaced, however long that takes."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """As root wants its configuration, and as the relay's user can read it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tpctl-soak-") as name:
        yield Path(name)


@pytest.mark.root
@pytest.mark.needs("cgroup", "interception")
def test_some_seconds_of_it(folder: Path) -> None:
    outcome = soak(SECONDS, folder, engines=("nftables", "iptables nft"), least=LEAST)
    assert not outcome.faults, str(outcome)
    assert outcome.events["swap engine"] >= 1
    assert outcome.seen.connections > 50
    assert outcome.samples[-1]["relay: descriptors"] > 5


@pytest.mark.root
@pytest.mark.needs("ebpf", "interception")
@pytest.mark.parametrize(
    "before",
    ["iptables legacy", pytest.param("nftables", marks=takes_long), pytest.param("iptables nft", marks=takes_long)],
)
def test_connections_through_the_relay_outlive_a_change_to_ebpf_and_back(folder: Path, before: str) -> None:
    """eBPF programs translate nothing, so what keeps the kernel's NAT alive for them has to stay."""
    with plant(folder) as made:
        made.engine = before
        made.install()
        kept = [lasting(made, family, address) for family, address in REMOTES.items()]
        for engine in ("ebpf", before):
            made.engine = engine
            made.install()
            for one in kept:
                one.sendall(b"word")
                assert _exactly(one, 4) == b"word", engine
        for one in kept:
            one.close()


def lasting(made: Plant, family: socket.AddressFamily, address: str) -> socket.socket:
    with made.lab.inside(HOST, APP):
        one = socket.socket(family)
    one.settimeout(60)
    one.connect((address, PORT))
    one.sendall(ECHO)
    assert one.recv(1) == THROUGH
    assert one.recv(1) == ECHO
    return one


def test_growth_is_told_from_noise() -> None:
    steady = [{"relay: descriptors": 20 + number % 7, "rules and sets, nftables 0": 79} for number in range(60)]
    assert not any(one.grows for one in judge(steady))
    leaking = [{"relay: descriptors": 20 + number, "rules and sets, nftables 0": 79} for number in range(60)]
    assert [one.name for one in judge(leaking) if one.grows] == ["relay: descriptors"]
    one_more = [{"rules and sets, nftables 0": 79 + (number > 30)} for number in range(60)]
    assert judge(one_more) == [Verdict("rules and sets, nftables 0", 79, 80, 80, 79)]
    assert judge(one_more)[0].grows
    assert judge(steady[:2]) == []


def test_a_leak_that_began_in_the_warm_up_is_not_excused_by_it() -> None:
    values = [{"relay: memory, KB": 30_000 if number < 6 else 30_000 + 100 * number} for number in range(60)]
    assert judge(values)[0].grows


def test_a_window_excuses_what_began_before_its_end() -> None:
    window = Window()
    before = window.begin()
    assert not window.excuses(before)
    with window.opened():
        during = window.begin()
        assert window.excuses(before)
    assert window.excuses(before)
    assert window.excuses(during)
    assert not window.excuses(window.begin())
