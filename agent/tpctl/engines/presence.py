"""Which tables and chains netfilter holds in this network namespace, by their names alone: a message to the kernel for
each kind.

To read rules takes processes (a program, or libnftables in a child) and the modules that understand them. Without a
table there are no rules, and many a host has none of somebody else's. What is not certain counts as there.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tpctl.spec.policy import Family
from tpctl.system import netlink, text

NF_TABLES = 10 << 8
"""NFNL_SUBSYS_NFTABLES (linux/netfilter/nfnetlink.h), and below the messages of linux/netfilter/nf_tables.h."""
GETTABLE = NF_TABLES | 1
TABLE_NAME = 1
GETCHAIN = NF_TABLES | 4
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_TYPE = 1, 3, 7
FAMILIES = {"inet": 1, "ip": socket.AF_INET, "ip6": socket.AF_INET6}
LEGACY_TABLES = {Family.IPV4: Path("/proc/net/ip_tables_names"), Family.IPV6: Path("/proc/net/ip6_tables_names")}
"""The x_tables tables that exist in this network namespace; reading it loads nothing, unlike asking iptables-legacy."""
OURS = "tpctl"
BESIDE_PROGRAMS = f"inet {OURS}_ebpf"
_OUR_TABLES = frozenset({OURS, f"{OURS}_ebpf", f"{OURS}_answers"})
TRACE_TABLE = f"{OURS}_trace"
"""What a table's name begins with in which packets are marked to be traced; it goes with the process that made it."""
IPTABLES_FAMILIES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_MOST = 100
"""As many surely come in one part, of which the kernel leaves nothing out when tables come and go meanwhile."""


IPTABLES_TABLES = frozenset({"filter", "nat", "mangle", "raw", "security"})
IPTABLES_CHAINS = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
"""What iptables-nft calls its tables and base chains."""


class Chain(NamedTuple):
    """A chain of nf_tables."""

    family: str
    table: str
    name: str
    kind: str
    """"filter", "nat" or "route"; empty for a chain that is only reached by a jump."""

    @property
    def is_like_iptables(self) -> bool:
        """Whether iptables-nft has such a chain in such a table, as far as names tell."""
        if self.family not in IPTABLES_FAMILIES.values() or self.table not in IPTABLES_TABLES:
            return False
        return not self.kind or (self.name in IPTABLES_CHAINS and (self.kind == "nat") == (self.table == "nat"))


def is_ours(family: str, name: str) -> bool:
    """Whether a table of nf_tables is one that tpctl makes."""
    return (family == "inet" and name in _OUR_TABLES) or name.startswith(f"{TRACE_TABLE}_")


def ask(
    kind: int, family: int, body: bytes = b"", flags: int = 0, *, whole: bool = False
) -> Iterator[tuple[int, netlink.Attributes]]:
    """What nf_tables answers: a family and attributes each. Raises OSError, as `Netlink.ask` does."""
    with netlink.Netlink(netlink.NETFILTER) as kernel:
        for message in kernel.ask(kind, struct.pack("=BBH", family, 0, 0) + body, flags, whole=whole):
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
    held = tables()
    return held is None or any(found == IPTABLES_FAMILIES[family] for found, _ in held)


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
    held = tables()
    return (
        held is None
        or any(not is_ours(family, name) for family, name in held)
        or any(legacy_tables_exist(family) for family in Family)
    )


def iptables_tables() -> frozenset[tuple[str, str]] | None:
    """Families and names of all tables in nf_tables that are not tpctl's, where iptables-nft is sure to list them all.

    None where one of them may be somebody else's, whom only nft lists. One of such a name may still hold what
    iptables-nft does not understand, and is not in its listing then.
    """
    held, inside = tables(), chains()
    if held is None or inside is None:
        return None
    theirs = frozenset(each for each in held if not is_ours(*each))
    likely = all(family in IPTABLES_FAMILIES.values() and name in IPTABLES_TABLES for family, name in theirs)
    likely = likely and all(chain.is_like_iptables for chain in inside if (chain.family, chain.table) in theirs)
    return theirs if likely else None


def chains() -> list[Chain] | None:
    """Those in nf_tables that see IP packets of this host; None when that is not certain."""
    names = {number: name for name, number in FAMILIES.items()}
    try:
        found = [*ask(GETCHAIN, socket.AF_UNSPEC, flags=netlink.DUMP, whole=True)]
    except OSError:
        return None
    return [
        Chain(names[family], _text(held, _CHAIN_TABLE), _text(held, _CHAIN_NAME), _text(held, _CHAIN_TYPE))
        for family, held in found
        if family in names
    ]


def _text(held: netlink.Attributes, kind: int) -> str:
    return text.decoded(held.get(kind, b"").rstrip(b"\0"))


def tables() -> list[tuple[str, str]] | None:
    """Families and names of those in nf_tables that see IP packets of this host; None when that is not certain."""
    names = {number: name for name, number in FAMILIES.items()}
    try:
        found = [*ask(GETTABLE, socket.AF_UNSPEC, flags=netlink.DUMP)]
    except OSError:
        return None
    if len(found) > _MOST:
        return None
    return [(names[family], _text(table, TABLE_NAME)) for family, table in found if family in names]
