"""The way out is never barred: uninstall where disks are full or read-only, and beside whatever lies in /run/tpctl."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.netns.hostile_room import NOBODY, Room, ok, room
from tests.swap import kumactl
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--iptables-mode", "nft"),
    "iptables legacy": ("--iptables-mode", "legacy"),
}


@pytest.fixture(scope="module")
def host() -> Iterator[Room]:
    with room() as made:
        yield made


def rules(host: Room) -> list[str]:
    """Everything of netfilter; but the tables of the legacy variant, which cannot be removed, are as good as none."""
    return [line for line in host.rules().splitlines() if not line.startswith(("*", ":", "COMMIT"))]


@pytest.fixture
def bare(host: Room) -> Iterator[list[str]]:
    """The rules of a host on which nothing is installed, before and after."""
    before = rules(host)
    yield before
    ok(host.tpctl("uninstall"))
    assert rules(host) == before
    assert not host.path("/run/tpctl").exists()


@contextmanager
def read_only(host: Room, *places: str) -> Iterator[None]:
    """File systems that cannot be written to for the length of the block."""
    for place in places:
        ok(host.run("mount", "-o", "remount,ro", place))
    try:
        yield
    finally:
        for place in places:
            ok(host.run("mount", "-o", "remount,rw", place))


def as_kumactl_leaves_it(host: Room, variant: str) -> None:
    """A host on which tpctl has never been. (The legacy tables stay, empty.)"""
    script = f"iptables-{variant}-restore --noflush <<'END'\n{kumactl.ruleset(Family.IPV4)}END\nrm -f /run/xtables.lock"
    ok(host.run("sh", "-c", script))


@pytest.mark.parametrize("flags", ENGINES.values(), ids=ENGINES)
def test_a_read_only_run_after_an_install(host: Room, bare: list[str], flags: tuple[str, ...]) -> None:
    ok(host.install(*flags))
    with read_only(host, "/run"):
        done = host.tpctl("uninstall")
        assert ok(done)
        assert "state.json cannot be removed: Read-only file system; until the next boot" in done.stderr
        assert rules(host) == bare
        refused = host.install()
        assert refused.returncode == 1
        assert "Nothing was changed" in refused.stderr
        assert rules(host) == bare


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_read_only_run_where_nothing_of_tpctl_is(host: Room, variant: str) -> None:
    as_kumactl_leaves_it(host, variant)
    with read_only(host, "/run"):
        done = host.tpctl("uninstall")
        assert ok(done)
        assert "cannot be taken: Read-only file system; it was done without" in done.stderr
        assert "KUMA" not in host.rules()
    ok(host.tpctl("uninstall"))


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_full_run(host: Room, variant: str) -> None:
    as_kumactl_leaves_it(host, variant)
    room_for_few = "mount -o remount,nr_inodes=$(($(df --output=iused /run | tail -n 1) + 3)) /run"
    fill = "for i in 1 2 3 4 5; do touch /run/full-$i 2>/dev/null || exit 0; done; exit 1"
    ok(host.run("sh", "-c", f"{room_for_few} && {fill}"))
    try:
        done = host.tpctl("uninstall")
        assert ok(done)
        assert "No space left on device; it was done without" in done.stderr
        assert "KUMA" not in host.rules()
    finally:
        ok(host.run("mount", "-o", "remount,nr_inodes=100000", "/run"))
        ok(host.run("sh", "-c", "rm -f /run/full-*"))
    ok(host.tpctl("uninstall"))


def test_a_read_only_run_that_is_somebody_elses(host: Room, bare: list[str]) -> None:
    """Nothing in there is believed, and nothing of it is needed."""
    ok(host.install("--engine", "nftables"))
    ok(host.run("chown", "-R", f"{NOBODY}:{NOBODY}", "/run/tpctl"))
    with read_only(host, "/run"):
        done = host.tpctl("uninstall")
        assert ok(done)
        assert "it was done without" in done.stderr
        assert rules(host) == bare


def test_a_file_in_place_of_the_directory(host: Room, bare: list[str]) -> None:
    ok(host.install("--engine", "nftables"))
    ok(host.run("sh", "-c", "mv /run/tpctl /run/aside; echo > /run/tpctl"))
    try:
        done = host.tpctl("uninstall")
        assert ok(done)
        assert "/run/tpctl is not a directory; remove it; it was done without" in done.stderr
        assert rules(host) == bare
    finally:
        ok(host.run("sh", "-c", "rm /run/tpctl; mv /run/aside /run/tpctl"))


def test_a_read_only_root(host: Room, bare: list[str]) -> None:
    ok(host.install("--engine", "nftables"))
    ok(host.run("mount", "--bind", "/etc", "/etc"))
    ok(host.run("mount", "-o", "remount,ro,bind", "/etc"))
    try:
        with read_only(host, "/var/cache"):
            assert ok(host.tpctl("uninstall"))
        assert rules(host) == bare
    finally:
        ok(host.run("umount", "/etc"))


def test_who_only_looks_does_not_wait_for_the_lock(host: Room, bare: list[str]) -> None:
    ok(host.install("--engine", "nftables"))
    lock = f"/run/tpctl/{host.key()}.lock"
    script = f"exec flock {lock} sh -c 'echo held; exec cat'"
    argv = ["/usr/bin/nsenter", f"--target={host.holder}", "--mount", "--net", "--wd=/", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        during = host.rules()
        looking = (
            ("uninstall", "--dry-run"), ("uninstall", "--flush", "--dry-run"), ("status",), ("persist",),
            ("install", "--kuma-dp-user", "nobody", "--dry-run"), ("explain", "outbound", "--to", "203.0.113.7:80"),
        )  # fmt: skip
        for words in looking:
            done = host.tpctl(*words)
            assert "another tpctl" not in done.stderr, words
            assert done.returncode in (0, 3), (words, done.stderr)
        assert "would remove nftables: table inet tpctl" in host.tpctl("uninstall", "--dry-run").stdout
        assert host.rules() == during
        assert holder.poll() is None
        holder.communicate()
