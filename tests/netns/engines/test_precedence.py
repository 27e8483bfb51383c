"""Translations of others in tables of their own: whose comes first is seen by connections, and status tells of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.netns.engines.test_iptables_order import CONTAINER, INBOUND, OUTBOUND, OWN, PUBLISHED, Scene, made
from tests.netns.lab import PROXY_USER, run, tpctl
from tpctl.rehearsal.layout import HOST
from tpctl.rehearsal.sockets import Seat
from tpctl.spec.policy import Protocol

pytestmark = pytest.mark.root

LOCAL = Seat(HOST, 4444)
REDIRECT = """
table inet other {
    chain arriving { type nat hook prerouting priority %d; tcp dport 4000 redirect to :4444; }
    chain leaving { type nat hook output priority %d; tcp dport 4000 redirect to :4444; }
}
"""
DOCKER = """
table ip docker-bridges {
    chain nat-prerouting { type nat hook prerouting priority %d; fib daddr type local counter jump nat-both; }
    chain nat-output {
        type nat hook output priority %d;
        ip daddr != 127.0.0.0/8 fib daddr type local counter jump nat-both
    }
    chain nat-both { iifname != "docker0" tcp dport 8080 counter dnat to 172.17.0.2:80; }
}
"""
"""As Docker 29 makes it with "firewall-backend": "nftables", but for the priority, which is -100 there."""
NFTABLES = ("--engine", "nftables")
FIRST = ("--redirect-inbound-insert-instead-of-append", "--redirect-outbound-insert-instead-of-append")


@contextmanager
def installed(variant: str, *flags: str) -> Iterator[Scene]:
    """The host of the rules of that variant, with an installation for the length of the block."""
    with made(variant) as scene:
        scene.lab.listen(HOST, Protocol.TCP, LOCAL.port)
        install(scene, *flags)
        try:
            yield scene
        finally:
            with scene.lab.inside(HOST):
                tpctl("uninstall")


def install(scene: Scene, *flags: str) -> None:
    with scene.lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER, *flags)


def status(scene: Scene) -> tuple[int, dict[str, Any]]:
    """The exit code and the report."""
    with scene.lab.inside(HOST):
        done = tpctl("status", "--json", check=False)
    return done.returncode, json.loads(done.stdout)


def test_beside_the_nftables_engine() -> None:
    with installed("nft", *NFTABLES) as scene:

        def rules(text: str) -> None:
            with scene.lab.inside(HOST):
                run(["nft", "-f", "-"], stdin=text)

        def told() -> list[str]:
            code, report = status(scene)
            found = [line for line in report["problems"] if "tpctl's rules" in line]
            assert (report["drift"], code) == ([], 3 if report["problems"] else 0)
            return found

        rules(DOCKER % (-100, -100))
        assert (scene.arriving(PUBLISHED), scene.arriving(OWN), told()) == (CONTAINER, INBOUND, [])
        rules("delete table ip docker-bridges\n" + DOCKER % (-50, -50))
        assert scene.arriving(PUBLISHED) == INBOUND
        (line,) = told()
        assert line.startswith("chain ip docker-bridges nat-prerouting (priority -50): `fib daddr type local")
        assert "behind tpctl's rules" in line
        rules("delete table ip docker-bridges\n" + REDIRECT % (-105, -105))
        assert (scene.arriving(4000), scene.leaving(4000)) == (LOCAL, LOCAL)
        arriving, leaving = told()
        assert "chain inet other arriving (priority -105): `tcp dport 4000 redirect to :4444`" in arriving
        assert "go past the data plane" in leaving
        install(scene, *NFTABLES, *FIRST)
        assert (scene.arriving(4000), scene.leaving(4000), len(told())) == (LOCAL, LOCAL, 2)
        rules("delete table inet other\n" + REDIRECT % (-100, -100))
        assert (scene.arriving(4000), scene.leaving(4000), told()) == (INBOUND, OUTBOUND, [])
        install(scene, *NFTABLES, "--exclude-inbound-ports", "4000", "--exclude-outbound-ports", "4000")
        assert (scene.arriving(4000), scene.leaving(4000), told()) == (LOCAL, LOCAL, [])


def test_rules_of_iptables_beside_the_nftables_engine(variant: str) -> None:
    with installed(variant, *NFTABLES) as scene:
        scene.rule("-A", "PREROUTING", "-p", "tcp", "--dport", "4000", "-j", "REDIRECT", "--to-ports", "4444")
        scene.rule("-I", "PREROUTING", "-p", "tcp", "--dport", str(OWN), "-j", "ACCEPT")
        assert (scene.arriving(4000), scene.arriving(OWN)) == (LOCAL, INBOUND)
        (line,) = [line for line in status(scene)[1]["problems"] if "tpctl's rules" in line]
        assert line.startswith(f"IPv4 iptables-{variant}: nat PREROUTING: `-A PREROUTING -p tcp -m tcp --dport 4000")


def test_dockers_nftables_backend_beside_the_iptables_engine(variant: str) -> None:
    """Neither engine nor kernel can tell who comes first: that depends on who was started last."""
    with installed(variant, "--engine", "iptables", "--iptables-mode", variant) as scene:
        with scene.lab.inside(HOST):
            run(["nft", "-f", "-"], stdin=DOCKER % (-100, -100))
        code, report = status(scene)
        (line,) = [line for line in report["problems"] if "docker-bridges" in line]
        assert code == 3
        assert "who was started last comes first; use --engine nftables" in line
