"""The text of iptables-save(8), read into values; what is ours in it, and what is kumactl's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tpctl.engines.iptables.rule import options_of, parse, split

OWN_CHAINS = "TPCTL_"
KUMA_CHAINS = "KUMA_MESH_"
KUMA_COMMENT = "kuma/mesh/transparent/proxy/"
DOCKER_DNS_CHAIN = "DOCKER_OUTPUT"
"""Docker's embedded DNS server (127.0.0.11) is reached through this chain of nat (libnetwork/resolver_unix.go)."""

_TABLE = re.compile(r"\*([^ \n]+)$")
_CHAIN = re.compile(r":([^ \n]+) ([^ \n]+)(?: \[(\d+):(\d+)\])?$")
_RULE = re.compile(r"(?:\[(\d+):(\d+)\] )?-A ([^ \n]+) ?(.*)$", re.DOTALL)
_LINE = re.compile(
    r'(?:[^"\n]++|(?<= )(?<!-[Aiogj] )(?<!physdev-in )(?<!physdev-out )"(?>[^"\\]++|\\.)*+"|")+', re.DOTALL
)
"""Somebody's comment may hold line breaks, and behind them what looks like rules of ours. Quoted, they end no line. A
quote begins such text only where a word begins, and not in a name."""


@dataclass(frozen=True, slots=True)
class SavedRule:
    """A rule as it stands in a chain."""

    chain: str
    index: int
    """Its place in the chain, from 1."""
    text: str
    """What follows `-A CHAIN`."""
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class SavedTable:
    """A table: its chains (with the policy, "-" for user-defined ones) and their rules, in order."""

    name: str
    chains: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[SavedRule, ...] = ()
    policies: Mapping[str, str] = field(default_factory=dict)
    """Of each built-in chain, what stands behind its name: the policy, and its counters where they were listed."""

    def rules_of(self, chain: str) -> Iterator[SavedRule]:
        """The rules of one chain, in order."""
        return (rule for rule in self.rules if rule.chain == chain)

    def owned_chains(self) -> tuple[str, ...]:
        """Chains that tpctl or kumactl made."""
        return tuple(chain for chain in self.chains if owner_of_chain(chain))

    def owned_jumps(self) -> tuple[SavedRule, ...]:
        """Rules of tpctl or kumactl in chains that are neither's."""
        return tuple(rule for rule in self.rules if not owner_of_chain(rule.chain) and owner_of_rule(rule.text))

    def owners(self) -> frozenset[str]:
        """Who of "tpctl" and "kumactl" has anything here."""
        found = {owner_of_chain(chain) for chain in self.chains} | {
            owner_of_rule(rule.text) for rule in self.owned_jumps()
        }
        return frozenset(owner for owner in found if owner)

    def redirected_ports(self) -> frozenset[int]:
        """Where rules of tpctl or kumactl redirect to."""
        return frozenset(
            int(value.removeprefix(":"))
            for rule in self.rules
            if owner_of_chain(rule.chain) or owner_of_rule(rule.text)
            for option, value in options_of(split(rule.text))
            if option in ("--to-ports", "--to-destination") and value.removeprefix(":").isdecimal()
        )

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but built-in chains with their default policy."""
        return not self.rules and all(policy == "ACCEPT" for policy in self.chains.values())


def read(text: str) -> dict[str, SavedTable]:
    """The tables of a listing. Comments, such as the warning about tables only nft understands, are passed over."""
    tables: dict[str, SavedTable] = {}
    name = ""
    chains: dict[str, str] = {}
    rules: list[SavedRule] = []
    policies: dict[str, str] = {}
    lengths: dict[str, int] = {}
    for line in _LINE.findall(text):
        if found := _TABLE.match(line):
            name, chains, rules, policies, lengths = found[1], {}, [], {}, {}
        elif found := _CHAIN.match(line):
            chains[found[1]] = found[2]
            if found[2] != "-":
                policies[found[1]] = line.partition(" ")[2]
        elif found := _RULE.match(line):
            chain = found[3]
            lengths[chain] = lengths.get(chain, 0) + 1
            rules.append(SavedRule(chain, lengths[chain], found[4], int(found[1] or 0), int(found[2] or 0)))
        elif line == "COMMIT":
            tables[name] = SavedTable(name, chains, tuple(rules), policies)
    return tables


def owner_of_chain(chain: str) -> str | None:
    """Who made a chain of that name: "tpctl", "kumactl" or somebody else (None)."""
    if chain.startswith(OWN_CHAINS):
        return "tpctl"
    return "kumactl" if chain.startswith(KUMA_CHAINS) else None


def owner_of_rule(text: str) -> str | None:
    """Who made a rule, by its target; a name in a comment proves nothing.

    Except kumactl's at its beginning: rules that it has put into built-in chains have nothing else to be known by.
    """
    # A host may have ten thousands of rules, each asked about ten times. Only escaped signs can hide these words.
    if OWN_CHAINS in text or KUMA_CHAINS in text or KUMA_COMMENT in text or "\\" in text:
        return owner_of_words(split(text))
    return None


def owner_of_words(words: Iterable[tuple[str, bool]]) -> str | None:
    """Who made the rule of these words, each with whether it was quoted; see `owner_of_rule`."""
    for option, value in options_of(words):
        if option in ("-j", "-g") and (owner := owner_of_chain(value)):
            return owner
        if option == "--comment" and value.startswith(KUMA_COMMENT):
            return "kumactl"
    return None


def looks_like_kumactl(text: str) -> bool:
    """Whether an uncommented rule of a built-in chain has a shape kumactl writes there (DNS and zone rules)."""
    return (
        "--comment" not in text
        and ("--dport 53 " in text or "--sport 53 " in text)
        and ("-j REDIRECT" in text or "-j CT" in text or "--uid-owner" in text)
    )


def comment_of(text: str) -> str | None:
    """The comment of a rule's text, when it can be read."""
    try:
        return parse(text).comment
    except ValueError:
        return None
