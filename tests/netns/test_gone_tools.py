"""Hosts on which what tpctl installed with is gone when it is looked for, or was never where it is looked for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.netns.hostile_room import Room, ok, room

pytestmark = pytest.mark.root

MULTIS = ("/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi")
GONE = "the iptables engine has installed rules here, by the record"


@pytest.fixture
def host() -> Iterator[Room]:
    with room() as made:
        yield made


def hide(host: Room) -> None:
    """As if the package iptables had been removed; copies stay in /run."""
    for path in MULTIS:
        ok(host.run("cp", path, "/run/"))
        ok(host.run("mount", "--bind", "/dev/null", path))


def show(host: Room) -> None:
    for path in MULTIS:
        ok(host.run("umount", path))


def redirects(host: Room) -> bool:
    return "TPCTL_INBOUND" in ok(host.run("nft", "list", "ruleset"))


def test_an_uninstall_without_the_tools_of_the_install_does_not_call_it_done(host: Room) -> None:
    ok(host.install("--iptables-mode", "nft"))
    hide(host)
    for words in (("uninstall",), ("uninstall", "--dry-run"), ("install", "--kuma-dp-user", "nobody")):
        done = host.tpctl(*words)
        assert (done.returncode, GONE in done.stderr) == (2, True), done
        assert redirects(host)
        assert "inet tpctl" not in ok(host.run("nft", "list", "tables"))
    asked = host.tpctl("status", "--json")
    assert asked.returncode == 3
    problems = json.loads(asked.stdout)["problems"]
    assert any(GONE in problem for problem in problems)
    assert not any("tpctl apply" in problem for problem in problems)
    show(host)
    ok(host.tpctl("uninstall"))
    assert not redirects(host)


def test_an_uninstall_finds_the_programs_that_the_install_was_given(host: Room) -> None:
    hide(host)
    programs = [f"{tool}{verb}" for tool in ("iptables", "ip6tables") for verb in ("", "-save", "-restore")]
    ok(host.run("mkdir", "/run/opt"))
    for name in programs:
        ok(host.run("ln", "-s", "/run/xtables-nft-multi", f"/run/opt/{name}"))
    given = ",".join(f"{name}:/run/opt/{name}" for name in programs)
    ok(host.install("--iptables-executables", given))
    assert redirects(host)
    assert "removed: " in ok(host.tpctl("uninstall"))
    assert not redirects(host)
