"""Interfaces, rules and chains of others whose names and comments are no UTF-8, or mean something elsewhere."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.netns.hostile_room import Room, ok, room

pytestmark = pytest.mark.root

INTERFACES = (
    b"x\xffy", b"a\x1cb", b'"q', b"*", b"-j", b"u\xc2\x85z", b"l\xe2\x80\xa8s", b"$(id)", b"it's", b"fifteen_bytes_x",
    b"e\x1b[31m", b"{};", b"!x", b"..x", b"\\",
)  # fmt: skip
"""Linux forbids `/`, `:` and white space, and nothing else (dev_valid_name in net/core/dev.c)."""
COMMENT = b'odd \xff "q" \xe9\n-A OUTPUT -j TPCTL_X'
KUMA_COMMENT = b"kuma/mesh/transparent/proxy/dns \xff"
ENGINES = [
    ("nftables", "--engine", "nftables"),
    ("nft", "--engine", "iptables", "--iptables-mode", "nft"),
    ("legacy", "--engine", "iptables", "--iptables-mode", "legacy"),
]
SAVES = [f"{tool}-{variant}-save" for variant in ("nft", "legacy") for tool in ("iptables", "ip6tables")]


def raw(host: Room, *argv: str | bytes) -> bytes:
    """What a program prints, whatever that is."""
    words = ["/usr/bin/nsenter", f"--target={host.holder}", "--mount", "--net", *argv]
    return subprocess.run(words, capture_output=True, check=True, timeout=60).stdout


def rules(host: Room) -> list[bytes]:
    """Those of both variants of iptables, with their chains, and the other table. Tables of the legacy one stay."""
    saved = b"".join(raw(host, save) for save in SAVES).splitlines()
    other = raw(host, "nft", "--stateless", "list", "table", "inet", "other").splitlines()
    return [line for line in saved if line.startswith(b"-A ") or b" - [0:0]" in line] + other


@pytest.fixture
def host() -> Iterator[Room]:
    with room() as made:
        for number, name in enumerate(INTERFACES):
            raw(made, "ip", "link", "add", "name", name, "type", "veth", "peer", "name", f"p{number}")
            raw(made, "ip", "link", "set", "dev", name, "up")
            raw(made, "ip", "link", "set", "dev", f"p{number}", "up")
            raw(made, "ip", "-6", "address", "add", f"fd66:{number}::1/64", "dev", name, "nodad")
            raw(made, "ip", "rule", "add", "iif", name, "lookup", str(9000 + number))
        raw(made, "ip", "address", "add", "10.66.0.1/24", "dev", INTERFACES[0])
        raw(made, "ip", "route", "add", "default", "via", "10.66.0.2")
        yield made


def foreign(host: Room) -> None:
    """Rules of others with such names, at every place where ours will stand."""
    for variant in ("nft", "legacy"):
        for tool in (f"iptables-{variant}", f"ip6tables-{variant}"):
            raw(host, tool, "-t", "nat", "-N", b"CH\xff")
            raw(host, tool, "-t", "nat", "-N", b'a"b')
            raw(host, tool, "-t", "nat", "-A", "PREROUTING", "-i", b"x\xffy", "-j", b"CH\xff")
            raw(host, tool, "-t", "nat", "-A", "PREROUTING", "-i", b'"q', "-j", b'a"b')
            raw(
                host,
                tool,
                "-t",
                "nat",
                "-A",
                "OUTPUT",
                "-o",
                b'"q',
                "-m",
                "comment",
                "--comment",
                COMMENT,
                "-j",
                "RETURN",
            )
    raw(host, "nft", "add table inet other; add chain inet other c { type nat hook output priority -100; }")
    raw(host, "nft", b'add rule inet other c oifname "x\xffy" counter comment "com \xff \xe9"')


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine[0])
def test_every_command_does_its_work_among_odd_names(host: Room, engine: tuple[str, ...]) -> None:
    foreign(host)
    before = rules(host)
    flags = ("--kuma-dp-user", "nobody", "--redirect-all-dns-traffic", "--inbound-mode", "tproxy")
    ok(host.tpctl("install", *flags, *engine[1:], "--confirm-within", "600s"))
    status = host.tpctl("status", "--json")
    assert json.loads(status.stdout)["drift"] == [], status.stderr
    ok(host.tpctl("apply"))
    ok(host.tpctl("rollback"))
    assert rules(host) == before
    ok(host.install(*engine[1:]))
    assert r"via x\xffy" in ok(host.tpctl("explain", "outbound", "--to", "10.1.2.3:443"))
    assert "would remove" in ok(host.tpctl("uninstall", "--dry-run"))
    ok(host.tpctl("uninstall"))
    assert "nothing to do" in ok(host.tpctl("uninstall"))
    assert rules(host) == before


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine[0])
def test_rules_of_kumactls_with_odd_names_go_and_come_back(host: Room, engine: tuple[str, ...], variant: str) -> None:
    foreign(host)
    for tool in (f"iptables-{variant}", f"ip6tables-{variant}"):
        raw(host, tool, "-t", "nat", "-N", "KUMA_MESH_INBOUND")
        raw(host, tool, "-t", "nat", "-A", "KUMA_MESH_INBOUND", "-i", b"x\xffz", "-j", "RETURN")
        jump = ("-i", b"x\xffz", "-m", "comment", "--comment", KUMA_COMMENT, "-j", "KUMA_MESH_INBOUND")
        raw(host, tool, "-t", "nat", "-A", "PREROUTING", *jump)
    before = rules(host)
    ok(host.install(*engine[1:], "--confirm-within", "600s"))
    assert not any(b"KUMA" in line for line in rules(host))
    ok(host.tpctl("rollback"))
    assert rules(host) == before
    ok(host.tpctl("uninstall"))
    assert not any(b"KUMA" in line for line in rules(host))


def test_a_strangers_rule_in_our_own_table_is_no_hindrance(host: Room) -> None:
    """nft aborts when it has to write such a name as JSON."""
    ok(host.install("--engine", "nftables"))
    raw(host, "nft", b'add rule inet tpctl outbound oifname "x\xffy" counter comment "\xe9"')
    drift = json.loads(host.tpctl("status", "--json").stdout)["drift"]
    assert any(r"x\xffy" in line for line in drift)
    assert r"x\xffy" in host.tpctl("status").stdout
    ok(host.tpctl("apply"))
    assert json.loads(host.tpctl("status", "--json").stdout)["drift"] == []
    raw(host, "nft", b'add rule inet tpctl outbound oifname "x\xffy" counter')
    ok(host.tpctl("uninstall"))
    assert b"tpctl" not in raw(host, "nft", "list", "tables")
