"""Rules of others for forwarded packets, which do not hold for what a virtual network sends through the data plane.

With `--vnet` a container's connection is redirected before it is routed: it ends at the data plane, which opens one of
its own. So it never passes the hook `forward`, where Docker's chain DOCKER-USER and most firewalls filter containers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from tpctl.engines.iptables import saved, tools
from tpctl.engines.iptables.backend import read_tables
from tpctl.engines.iptables.rule import options_of, split
from tpctl.engines.nftables import listing, nft
from tpctl.spec.policy import Family, Policy
from tpctl.system.errors import ApplyError, HostError

HOOK = "FORWARD"
_FAMILIES = {"ip": {Family.IPV4}, "ip6": {Family.IPV6}, "inet": set(Family)}
_TEXT = re.compile(r'"[^"]*"')
_ENDS_IT = re.compile(r"\b(?:drop|reject|tarpit)\b", re.IGNORECASE)
_CALLED = re.compile(r"\b(?:jump|goto) ([^ ,}]+)")
_MAP = re.compile(r"\bvmap @([^ ]+)")


def warnings(policy: Policy) -> tuple[str, ...]:
    """What an operator has to know who filters the containers of a virtual network by such rules."""
    families = {Family.of(network.network) for network in policy.virtual_networks}
    if not families:
        return ()
    try:
        found = [*_of_nf_tables(families), *_of_legacy(families)]
    except (ApplyError, HostError, nft.NftError):
        return ()
    if not found:
        return ()
    return (
        "--vnet: TCP connections and DNS queries of containers end at the data plane, which opens them again as this "
        f"host's own; rules for forwarded packets no longer apply to them: {'; '.join(found)}. What these rules block "
        f"must be blocked in the mesh, or for uid {policy.proxy_uid} on output (OUTPUT)",
    )


def _of_nf_tables(families: set[Family]) -> Iterator[str]:
    """Each table whose chains at the hook drop or reject anything, iptables-nft's among them."""
    try:
        way = nft.find()
    except HostError:
        return
    held = listing.read(way.listings(["list chains"])[0] or "")
    wanted = [
        f"{table.family} {table.name}"
        for table in held
        if families & _FAMILIES.get(table.family, set()) and any(chain.hook == HOOK.lower() for chain in table.chains)
    ]
    for where, text in zip(wanted, way.listings([f"list table {where}" for where in wanted]), strict=True):
        for table in listing.read(text or ""):
            if names := tuple(strict_chains(table)):
                yield f"table {where}, {_chains(names)}"


def strict_chains(table: listing.ListedTable) -> Iterator[str]:
    """The chains of a table that a forwarded packet may meet, and that may end its way. Pure."""
    chains = {chain.name: chain for chain in table.chains}
    maps = {name: text for kind, name, text in table.others if kind == "map"}
    rules = {
        name: [_TEXT.sub("", rule) for rule in (*chain.rules, *(maps.get(used, "") for used in _maps(chain.rules)))]
        for name, chain in chains.items()
    }
    calls = {name: [called for rule in mine for called in _CALLED.findall(rule)] for name, mine in rules.items()}
    hooked = [chain.name for chain in table.chains if chain.hook == HOOK.lower()]
    for name in _reached(hooked, calls):
        if chains[name].policy == "drop":
            yield f"{name} (policy drop)"
        elif any(_ENDS_IT.search(rule) for rule in rules[name]):
            yield name


def _maps(rules: Iterable[str]) -> list[str]:
    return [name for rule in rules for name in _MAP.findall(rule)]


def _of_legacy(families: set[Family]) -> Iterator[str]:
    for family in sorted(families):
        found = tools.find("legacy", family)
        for table in read_tables(found).values() if found else ():
            if names := tuple(strict_chains_of_saved(table)):
                yield f"{tools.command(family)}-legacy, table {table.name}, {_chains(names)}"


def strict_chains_of_saved(table: saved.SavedTable) -> Iterator[str]:
    """The same of a table of iptables. Pure."""
    targets = {
        chain: [value for rule in table.rules_of(chain) for option, value in options_of(split(rule.text))
                if option in ("-j", "-g")]
        for chain in table.chains
    }  # fmt: skip
    for name in _reached([HOOK] if HOOK in table.chains else [], targets):
        if table.chains[name] == "DROP":
            yield f"{name} (policy DROP)"
        elif any(_ENDS_IT.fullmatch(target) for target in targets[name]):
            yield name


def _reached(first: Iterable[str], calls: Mapping[str, Iterable[str]]) -> list[str]:
    """These chains and those that are called from them, each once."""
    reached: dict[str, None] = {}
    left = list(reversed(list(first)))
    while left:
        name = left.pop()
        if name in calls and name not in reached:
            reached[name] = None
            left += calls[name]
    return list(reached)


def _chains(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"chain {shown}" if len(names) == 1 else f"chains {shown}"
