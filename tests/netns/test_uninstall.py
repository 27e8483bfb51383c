"""Uninstall: everything of others stays, byte for byte, in place and with its counters; nothing of ours does."""

from __future__ import annotations

import socket

import pytest

from tests.netns.lab import bare_namespace, run, snapshot, tpctl

pytestmark = pytest.mark.root

FOREIGN = {
    "nat": ("PREROUTING", "OUTPUT", "POSTROUTING"),
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "FORWARD"),
    "filter": ("INPUT",),
}


def foreign_rules(label: str, *, with_chain: bool = False) -> str:
    """Restore text with a rule of somebody else's in every chain we may touch, and others."""
    lines = []
    for table, chains in FOREIGN.items():
        lines.append(f"*{table}")
        if with_chain:
            lines.append(":THEIRS - [0:0]")
            lines.append('-A THEIRS -p tcp -m comment --comment "not KUMA_MESH\'s" -j RETURN')
        lines += [f'-A {chain} -p tcp -m tcp --dport 4242 -m comment --comment "{label} {chain}"' for chain in chains]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def add_foreign(variant: str, text: str) -> None:
    for tool in ("iptables", "ip6tables"):
        run([f"{tool}-{variant}-restore", "--noflush"], stdin=text)


def insert_foreign(variant: str, position: int) -> None:
    for tool in ("iptables", "ip6tables"):
        for chain in ("PREROUTING", "OUTPUT"):
            run([f"{tool}-{variant}", "-t", "nat", "-I", chain, str(position), "-p", "udp", "--sport", "99"])


EVERYTHING = (
    "--exclude-inbound-ports",
    "22",
    "--redirect-all-dns-traffic",
    "--exclude-outbound-ips",
    "10.9.0.0/16,fd99::/16",
    "--vnet",
    "docker0:172.17.0.0/16",
    "--vnet",
    "br+:fd01::/64",
    "--drop-invalid-packets",
    "--iptables-logs",
)


def count_something() -> None:
    """Traffic, so that counters are not all zero."""
    for address in ("127.0.0.1", "::1"):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as dialler:
            dialler.connect_ex((address, 4242))


@pytest.mark.parametrize("flags", [("--exclude-inbound-ports", "22"), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("others_in", ["nft", "legacy"])
def test_uninstall_restores_every_byte_and_counter(variant: str, others_in: str, flags: tuple[str, ...]) -> None:
    with bare_namespace() as space, space.inside():
        for tables in {variant, others_in}:
            add_foreign(tables, foreign_rules("before", with_chain=True))
        count_something()
        before = snapshot(counters=True)
        tpctl("install", "--kuma-dp-user", "nobody", "--engine", "iptables", "--iptables-mode", variant, *flags)
        during = snapshot(counters=True)
        assert during != before
        tpctl("install", "--kuma-dp-user", "nobody", "--engine", "iptables", "--iptables-mode", variant)
        tpctl("uninstall")
        assert snapshot(counters=True) == before
        tpctl("uninstall")
        assert snapshot(counters=True) == before


def test_uninstall_from_a_host_without_any_rules(variant: str) -> None:
    with bare_namespace() as space, space.inside():
        before = snapshot(counters=True)
        tpctl("install", "--kuma-dp-user", "nobody", "--engine", "iptables", "--iptables-mode", variant, *EVERYTHING)
        tpctl("uninstall")
        after = snapshot(counters=True)
        if variant == "legacy":
            # The legacy kernel interface cannot unload a table from a namespace: it stays, empty.
            left = "".join(after[tool] for tool in ("iptables-legacy-save", "ip6tables-legacy-save"))
            assert not [line for line in left.splitlines() if not line.startswith(("*", ":", "COMMIT"))]
            before = {name: text for name, text in before.items() if "legacy" not in name}
            after = {name: text for name, text in after.items() if "legacy" not in name}
        assert after == before


def test_rules_that_came_after_ours_stay_in_their_order(variant: str) -> None:
    def others(space_has_ours: bool) -> dict[str, str]:
        with bare_namespace() as space, space.inside():
            add_foreign(variant, foreign_rules("before"))
            if space_has_ours:
                tpctl(
                    "install",
                    "--kuma-dp-user",
                    "nobody",
                    "--engine",
                    "iptables",
                    "--iptables-mode",
                    variant,
                    *EVERYTHING,
                )
            add_foreign(variant, foreign_rules("after"))
            # Position 1 is before everything, 2 between ours or, without ours, in front of "before".
            insert_foreign(variant, 1)
            insert_foreign(variant, 2)
            tpctl("uninstall")
            return snapshot(counters=False)

    assert others(space_has_ours=True) == others(space_has_ours=False)
