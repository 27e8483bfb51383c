"""The main job, end to end, in throwaway network namespaces: `make demo`.

A client host, our host with an application and the relay, and a server host. The real `tpctl install`, `tpctl relay`
and `tpctl uninstall` run on our host; real connections are opened before, between and after. Nothing of it touches the
machine's own network, and nothing is left: the namespaces vanish with this process.

    python -m tests.demo [auto|nft|legacy|nftables]

Exits with 0 only if every connection ended where it should and every rule of the host is as it was.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from tests.demo_relay import DIAL_SECONDS, Relay
from tests.netns.lab import PROXY_USER, run, snapshot, tpctl
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Bridge, Layout, member
from tpctl.rehearsal.sockets import Answer
from tpctl.spec.connection import Connection
from tpctl.spec.policy import RESERVED, Address, Family
from tpctl.system.errors import TpctlError

CLIENT_NETWORKS = (ip_network("10.20.0.0/24"), ip_network("fd20::/64"))
CLIENT_LINK = "clients0"
LAYOUT = Layout(bridges=(Bridge(CLIENT_LINK, CLIENT_NETWORKS),))
NAMES = {HOST: "application", PEER: "server", CLIENT_LINK: "client"}
APP, ROOT, PROXY = 1000, 0, 65534
NAME_SERVERS = ("10.0.0.53", "2001:db8::53")
SERVER = {Family.IPV4: ip_address("203.0.113.10"), Family.IPV6: ip_address("2001:db8:10::10")}
INSTALL = (
    *("--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "22", "--exclude-outbound-ports", "3306"),
    *("--exclude-outbound-ips", "203.0.113.99", "--redirect-dns"),
)
ENGINE_FLAGS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
    "nftables": ("--engine", "nftables"),
}
# Rules in raw and mangle as well: a legacy table that was never used appears, empty, once it has been.
FOREIGN = """*raw
-A PREROUTING -p tcp -m tcp --dport 9998 -m comment --comment "another tool's"
COMMIT
*mangle
-A FORWARD -p tcp -m tcp --dport 9998 -m comment --comment "another tool's"
COMMIT
*filter
:THEIRS - [0:0]
-A INPUT -p tcp -m tcp --dport 9999 -m comment --comment "another tool's" -j DROP
-A THEIRS -j RETURN
COMMIT
*nat
-A PREROUTING -p tcp -m tcp --dport 9998 -m comment --comment "another tool's" -j REDIRECT --to-ports 9997
-A OUTPUT -p tcp -m tcp --dport 9998 -m comment --comment "another tool's" -j REDIRECT --to-ports 9997
COMMIT
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A connection, and whether the relay should stand in between after the install."""

    label: str
    connection: Connection
    relayed: bool


def rows() -> list[Row]:
    """The connections of the demonstration."""
    found: list[Row] = []
    for family in Family:
        found += _rows(family)
    return found


def _rows(family: Family) -> Iterator[Row]:
    four = family is Family.IPV4
    client, own, server = (
        member(CLIENT_NETWORKS[0 if four else 1]),
        HOST_ADDRESS[family],
        SERVER[family],
    )

    def row(label: str, connection: Connection, relayed: bool) -> Row:
        return Row(f"IPv{family}  {label}", connection, relayed)

    yield row("client -> application:8080", LAYOUT.arriving(client, own, "tcp", 8080), True)
    yield row("client -> application:22, excluded", LAYOUT.arriving(client, own, "tcp", 22), False)
    yield row("application -> server:443", LAYOUT.outgoing("tcp", server, 443, APP), True)
    yield row("root -> server:443", LAYOUT.outgoing("tcp", server, 443, ROOT), True)
    yield row("data plane user -> server:443", LAYOUT.outgoing("tcp", server, 443, PROXY), False)
    yield row("application -> server:3306, excluded", LAYOUT.outgoing("tcp", server, 3306, APP), False)
    if four:
        excluded = ip_address("203.0.113.99")
        yield row("application -> 203.0.113.99, excluded", LAYOUT.outgoing("tcp", excluded, 443, APP), False)
        yield row("client -> application:8080/udp", LAYOUT.arriving(client, own, "udp", 8080), False)
    yield row("application -> own address:8080", LAYOUT.outgoing("tcp", own, 8080, APP), False)
    name_server = ip_address(NAME_SERVERS[0 if four else 1])
    yield row("DNS query by the application", LAYOUT.outgoing("udp", name_server, 53, APP), True)
    yield row("DNS query by the data plane user", LAYOUT.outgoing("udp", name_server, 53, PROXY), False)


@dataclass(slots=True)
class Stage:
    """The laboratory, with a fresh source port for every dial."""

    lab: Lab
    ports: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(30000))

    def dial(self, row: Row) -> Answer:
        """Open a row's connection."""
        connection = dataclasses.replace(row.connection, source_port=next(self.ports))
        return self.lab.dial(connection, timeout=DIAL_SECONDS, relayed=True)

    def who(self, answer: Answer) -> str:
        """The one who answered, in words."""
        return NAMES[answer.seat.node] if answer.seat else answer.outcome


def direct(stage: Stage, row: Row) -> tuple[str, bool]:
    """Dial where nothing is installed; what to print, and whether it is right."""
    answer = stage.dial(row)
    wanted = LAYOUT.locate(row.connection.destination)
    right = answer.seat is not None and answer.seat.node == wanted and answer.direct
    return stage.who(answer), right


def after_install(stage: Stage, row: Row, relay: Relay, seen: int) -> tuple[str, bool, int]:
    """Dial with the redirection in place; what to print, whether it is right, and the relay's connections so far."""
    answer = stage.dial(row)
    right = answer.seat is not None and answer.seat.node == LAYOUT.locate(row.connection.destination)
    right = right and answer.direct is not row.relayed
    text = stage.who(answer)
    if answer.direct:
        return text, right, seen
    if row.connection.protocol == "udp":
        return f"{text}, asked by the relay", right, seen
    destinations = relay.destinations(seen + 1)
    original = destinations[seen] if len(destinations) > seen else "unknown"
    wanted = _endpoint(row.connection.destination, row.connection.destination_port)
    right = right and original == wanted
    text = f"{text}, through the relay (to {original}"
    if row.connection.uid is None:
        right = right and answer.source == RESERVED[row.connection.family].passthrough.network_address
        text += f", from {answer.source}"
    return text + ")", right, len(destinations)


def _endpoint(address: Address, port: int | None) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def print_table(table: list[list[str]]) -> None:
    """Aligned columns."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for number, line in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def demonstrate(mode: str, directory: Path) -> bool:
    """The whole story; whether all of it held."""
    resolv_conf = directory / "resolv.conf"
    resolv_conf.write_text("".join(f"nameserver {server}\n" for server in NAME_SERVERS))
    wanted = rows()
    with Lab(LAYOUT) as lab:
        stage = Stage(lab)
        for row in wanted:
            lab.serve(row.connection)
        with lab.inside(HOST):
            for family_tool in ("iptables", "ip6tables"):
                tool = f"{family_tool}-{mode}" if mode in ("nft", "legacy") else family_tool
                run([f"{tool}-restore", "--noflush"], stdin=FOREIGN)
            before_rules = snapshot(counters=False)
        before = [direct(stage, row) for row in wanted]
        relay = Relay(lab, resolv_conf, directory / "relay.log")
        try:
            flags = (*INSTALL, *ENGINE_FLAGS[mode], "--resolv-conf", str(resolv_conf))
            print(f"$ tpctl install {' '.join(flags)}")
            with lab.inside(HOST):
                print(tpctl("install", *flags).stdout.rstrip())
            between: list[tuple[str, bool]] = []
            seen = 0
            for row in wanted:
                text, right, seen = after_install(stage, row, relay, seen)
                between.append((text, right))
            print("\n$ tpctl uninstall")
            with lab.inside(HOST):
                lines = tpctl("uninstall").stdout.rstrip().splitlines()
            print("\n".join(lines if len(lines) <= 6 else [*lines[:5], f"... and {len(lines) - 5} lines more"]))
        finally:
            relay.stop()
        after = [direct(stage, row) for row in wanted]
        with lab.inside(HOST):
            after_rules = snapshot(counters=False)
    held = report(wanted, before, between, after)
    return compare(before_rules, after_rules) and held


def report(
    wanted: list[Row], before: list[tuple[str, bool]], between: list[tuple[str, bool]], after: list[tuple[str, bool]]
) -> bool:
    """Print who answered; whether all of it was right."""
    table = [["connection", "before install", "after install", "after uninstall", ""]]
    held = True
    for row, columns in zip(wanted, zip(before, between, after, strict=True), strict=True):
        right = all(ok for _, ok in columns)
        held = held and right
        table.append([row.label, *(text for text, _ in columns), "ok" if right else "WRONG"])
    print()
    print_table(table)
    return held


def compare(before: dict[str, str], after: dict[str, str]) -> bool:
    """Print whether the rules are as they were; counters and the comments with dates aside."""
    print()
    same = True
    for name, text in before.items():
        equal = after[name] == text
        same = same and equal
        print(f"{name:<22} {'identical' if equal else 'DIFFERENT'} to before ({len(text)} bytes)")
        if not equal:
            print("\n".join(difflib.unified_diff(text.splitlines(), after[name].splitlines(), lineterm="")))
    return same


def main() -> int:
    """Run the demonstration."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "auto"
    if mode not in ENGINE_FLAGS or os.geteuid() != 0:
        print("usage, as root: python -m tests.demo [auto|nft|legacy|nftables]", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tpctl-demo-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # the relay reads resolv.conf as the data plane user
        try:
            held = demonstrate(mode, directory)
        except (TpctlError, AssertionError, RuntimeError) as error:
            print(f"the demonstration failed: {error}", file=sys.stderr)
            return 1
    seconds = time.monotonic() - started
    print(f"\n{'everything held' if held else 'NOT everything held'} ({seconds:.1f} s)")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
