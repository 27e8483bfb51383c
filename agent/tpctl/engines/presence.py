"""Which tables netfilter holds in this network namespace, by their names alone: a message to the kernel each.

To read rules takes processes (a program, or libnftables in a child) and the modules that understand them. Without a
table there are no rules, and many a host has none of somebody else's. What is not certain counts as there.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from tpctl.spec.policy import Family
from tpctl.system import netlink, text

NF_TABLES = 10 << 8
"""NFNL_SUBSYS_NFTABLES (linux/netfilter/nfnetlink.h), and below the messages of linux/netfilter/nf_tables.h."""
GETTABLE = NF_TABLES | 1
TABLE_NAME = 1
FAMILIES = {"inet": 1, "ip": socket.AF_INET, "ip6": socket.AF_INET6}
LEGACY_TABLES = {Family.IPV4: Path("/proc/net/ip_tables_names"), Family.IPV6: Path("/proc/net/ip6_tables_names")}
"""The x_tables tables that exist in this network namespace; reading it loads nothing, unlike asking iptables-legacy."""
OURS = "tpctl"
BESIDE_PROGRAMS = f"inet {OURS}_ebpf"
_OUR_TABLES = frozenset({OURS, f"{OURS}_ebpf", f"{OURS}_answers"})
TRACE_TABLE = f"{OURS}_trace"
"""What a table's name begins with in which packets are marked to be traced; it goes with the process that made it."""
_IPTABLES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_MOST = 100
"""As many surely come in one part, of which the kernel leaves nothing out when tables come and go meanwhile."""


def is_ours(family: str, name: str) -> bool:
    """Whether a table of nf_tables is one that tpctl makes."""
    return (family == "inet" and name in _OUR_TABLES) or name.startswith(f"{TRACE_TABLE}_")


def ask(kind: int, family: int, body: bytes = b"", flags: int = 0) -> Iterator[tuple[int, netlink.Attributes]]:
    """What nf_tables answers: a family and attributes each. Raises OSError."""
    with netlink.Netlink(netlink.NETFILTER) as kernel:
        for message in kernel.ask(kind, struct.pack("=BBH", family, 0, 0) + body, flags):
            yield message[0], netlink.parse(message[4:])


def lacks(where: str) -> bool:
    """Whether there certainly is no table of this family and name in nf_tables."""
    family, _, name = where.partition(" ")
    try:
        list(ask(GETTABLE, FAMILIES[family], netlink.attributes({TABLE_NAME: text.encoded(name) + b"\0"})))
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def may_hold_iptables(variant: str, family: Family) -> bool:
    """Whether there may be a table that the programs of a variant of iptables show."""
    if variant == "legacy":
        return legacy_tables_exist(family)
    tables = _tables()
    return tables is None or any(held == _IPTABLES[family] for held, _ in tables)


def may_hold_rules() -> bool:
    """Whether there may be any table that iptables shows, in either variant."""
    return any(may_hold_iptables(variant, family) for variant in ("nft", "legacy") for family in Family)


def legacy_tables_exist(family: Family) -> bool:
    """Whether any x_tables table exists in this network namespace."""
    try:
        return bool(LEGACY_TABLES[family].read_bytes())
    except OSError:
        return False


def others() -> bool:
    """Whether there may be a table that is not tpctl's."""
    tables = _tables()
    return (
        tables is None
        or any(not is_ours(family, name) for family, name in tables)
        or any(legacy_tables_exist(family) for family in Family)
    )


def _tables() -> list[tuple[str, str]] | None:
    """Families and names of those in nf_tables that see IP packets of this host; None when that is not certain."""
    names = {number: name for name, number in FAMILIES.items()}
    try:
        found = [*ask(GETTABLE, socket.AF_UNSPEC, flags=netlink.DUMP)]
    except OSError:
        return None
    if len(found) > _MOST:
        return None
    return [
        (names[family], text.decoded(table.get(TABLE_NAME, b"").rstrip(b"\0")))
        for family, table in found
        if family in names
    ]
