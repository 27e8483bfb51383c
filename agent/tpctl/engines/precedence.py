"""Whose translation comes first where several base chains see a connection: ours, or that of other software.

Between base chains their priorities decide, and of two with the same priority the one that was registered last comes
first (nf_register_net_hook() in net/netfilter/core.c). Within the chains of iptables, `iptables.order` tells.
"""

from __future__ import annotations

from collections.abc import Iterator

from tpctl.engines import presence
from tpctl.engines.iptables import order, tools
from tpctl.engines.iptables.meets import Judge
from tpctl.engines.iptables.nft_hooks import BUILT_IN
from tpctl.engines.listings import Listings
from tpctl.engines.nftables import listing, nft, translations
from tpctl.engines.nftables.ruleset import ARRIVING_LAST, FIRST, LAST
from tpctl.engines.nftables.table import NAME
from tpctl.engines.nftables.translations import HOOKS
from tpctl.host import routes
from tpctl.spec.policy import Family, Policy
from tpctl.system.errors import ApplyError, HostError

IPTABLES = -100
"""Of the nat chains of iptables, in both variants (NF_IP_PRI_NAT_DST in linux/netfilter_ipv4.h)."""
_FAMILIES = {Family.IPV4: ("ip", "inet"), Family.IPV6: ("ip6", "inet")}
_PROTOCOLS = ("tcp",)
_PAST = "such connections go past the data plane; exclude them in the policy, or take that rule away"


def problems(policy: Policy, engine: str, variant: str | None, listings: Listings) -> tuple[str, ...]:
    """Where translations of others, in other tables than ours, change what the policy means. Reads only."""
    if engine not in ("nftables", "iptables"):
        return ()
    found: list[str] = []
    try:
        chains = list(_native())
    except (ApplyError, HostError, nft.NftError):
        chains = []
    for family in sorted(policy.families):
        judge = Judge(policy, family, routes.local_networks(family))
        for chain in chains:
            if chain.family in _FAMILIES[family]:
                found += _of_native(chain, judge, priority(policy, family, engine, chain.hook))
        for other in tools.VARIANTS:
            if (engine, variant) != ("iptables", other):
                found += _of_iptables(other, judge, engine, listings)
    return tuple(dict.fromkeys(found))


def priority(policy: Policy, family: Family, engine: str, hook: str) -> int:
    """That of our chain at a hook ("PREROUTING" or "OUTPUT"), for TCP connections."""
    if engine == "iptables":
        return IPTABLES
    if hook == "OUTPUT":
        return FIRST if policy.outbound.insert else LAST
    return FIRST if policy.inbound.insert or policy.networks(family) else ARRIVING_LAST


def _native() -> Iterator[translations.Translations]:
    """The chains of type nat in tables of nftables that are neither ours nor those of iptables-nft."""
    if presence.iptables_tables() is not None:
        return
    way = nft.find()
    held = listing.read(way.listings(["list chains"])[0] or "")
    wanted = [
        f"{table.family} {table.name}"
        for table in held
        if not table.name.startswith(NAME)
        and any(_is_native(table, chain.name) for chain in table.chains if chain.kind == "nat" and chain.hook in HOOKS)
    ]
    for text in way.listings([f"list table {where}" for where in wanted]):
        for table in listing.read(text or ""):
            found = translations.read(table)
            yield from (each for each in found if _is_native(table, each.where.rpartition(" ")[2]))


def _is_native(table: listing.ListedTable, chain: str) -> bool:
    """Whether a base chain of type nat is not one that iptables-nft uses."""
    return table.family == "inet" or table.name != "nat" or chain not in BUILT_IN


def _of_native(chain: translations.Translations, judge: Judge, ours: int) -> Iterator[str]:
    for each in order.translating(chain.table, chain.hook, _PROTOCOLS, judge):
        if chain.hook == "OUTPUT" and not each.stays:  # a self-call of the data plane: what arrives is told already
            continue
        rule = f"chain {chain.where} (priority {chain.priority}): `{chain.rules[each.place - 1]}`"
        what = f"{rule} translates {each.met.protocol} port {each.met.destination_port}"
        is_first = judge.policy.outbound.insert if chain.hook == "OUTPUT" else judge.policy.inbound.insert
        if chain.priority < ours and each.stays:
            also = "" if is_first else f" (or let tpctl's rules come first: {order.FIRST_FLAGS[chain.hook]})"
            yield f"{what} before tpctl's rules: {_PAST}{also}"
        elif chain.priority == ours:
            yield f"{what} at the priority of tpctl's rules: who was started last comes first; use --engine nftables"
        elif chain.priority > ours and not is_first:
            yield (
                f"{what} behind tpctl's rules, so such connections go to the data plane; give that chain a lower "
                f"priority (dstnat), or exclude the port"
            )


def _of_iptables(variant: str, judge: Judge, engine: str, listings: Listings) -> Iterator[str]:
    table = listings.of(variant, judge.family).get("nat")
    for hook in ("PREROUTING", "OUTPUT") if table else ():
        assert table is not None
        ours = priority(judge.policy, judge.family, engine, hook)
        for each in order.translating(table, hook, _PROTOCOLS, judge):
            where = f"IPv{judge.family} iptables-{variant}: nat {hook}: {each}"
            if ours == IPTABLES:
                yield (
                    f"{where}: of the two variants of iptables, whichever made its table last comes first; use one "
                    "variant for all rules, or --engine nftables"
                )
            elif ours > IPTABLES and each.stays:
                flag = order.FIRST_FLAGS[hook]
                yield f"{where} before tpctl's rules: {_PAST} (or let tpctl's rules come first: {flag})"
