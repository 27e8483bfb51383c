"""Rules of other software as plain data, the same for nf_tables and both variants of iptables."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tpctl.spec.policy import Family


class Hook(enum.StrEnum):
    """Where a packet is, in nft's words (libnftables-json(5)); iptables writes them in capitals."""

    PREROUTING = "prerouting"
    INPUT = "input"
    OUTPUT = "output"
    POSTROUTING = "postrouting"


class Verdict(enum.StrEnum):
    """What a rule does with what it matches."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    TRANSLATE = "translate"
    """It changes an address or a port, and ends the chain."""
    MARK = "mark"
    """It sets the packet's mark, by which ip-rule(8) may send it another way."""
    MASQUERADE = "masquerade"
    """It changes the source, and ends the chain."""
    UNTRACK = "untrack"
    """It keeps conntrack from seeing the packet, so no rule of nat is asked, and the next rule is."""
    CONTINUE = "continue"
    """Anything else: it counts, logs or changes something, and the next rule is asked."""


ENDS = frozenset({Verdict.DROP, Verdict.REJECT})


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that a rule asks for: the packet's value is among `values`, or is not."""

    field: str
    """Such as "source" or "destination_port"; anything else is as the program writes it, and nobody can tell."""
    values: tuple[str, ...] = ()
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule in a chain."""

    text: str
    """As its own program lists it."""
    conditions: tuple[Condition, ...] = ()
    verdict: Verdict = Verdict.CONTINUE
    target: str = ""
    """The chain it jumps to."""
    handle: int = 0
    """The kernel's number for it, of nf_tables; 0 where it was not listed."""
    packets: int = 0
    """How often it has matched, of iptables."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain, with what it takes to be asked by the kernel itself."""

    name: str
    rules: tuple[Rule, ...] = ()
    hook: Hook | None = None
    priority: int = 0
    policy: Verdict = Verdict.ACCEPT
    kind: str = "filter"
    """"nat" is only asked about a connection's first packet."""
    packets: int = 0
    """How often its policy has decided, of iptables."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of nf_tables, or of a variant of iptables."""

    program: str
    """What lists it: "nft", "iptables-nft", "ip6tables-legacy", ..."""
    family: str
    """In nft's words: "ip", "ip6" or "inet"."""
    name: str
    chains: Mapping[str, Chain] = field(default_factory=dict)

    @property
    def is_iptables(self) -> bool:
        """Whether it is one of iptables, of either variant."""
        return self.program != "nft"

    def concerns(self, family: Family) -> bool:
        """Whether packets of that family pass it."""
        return self.family == "inet" or self.family == ("ip" if family is Family.IPV4 else "ip6")


@dataclass(frozen=True, slots=True)
class Place:
    """A rule where it stands; without one, the policy of a base chain."""

    table: Table
    chain: Chain
    rule: Rule | None = None
    path: tuple[str, ...] = ()
    """The chains by which it is reached, from the base chain to its own."""

    @property
    def text(self) -> str:
        """In words, as in `iptables-nft filter INPUT > ts-input: -s 100.64.0.0/10 -j DROP`."""
        where = (
            f"{self.table.program} {self.table.name}"
            if self.table.is_iptables
            else f"{self.table.family} {self.table.name}"
        )
        what = f"policy {str(self.chain.policy).upper() if self.table.is_iptables else self.chain.policy}"
        return f"{where} {' > '.join(self.path or (self.chain.name,))}: {self.rule.text if self.rule else what}"

    @property
    def base(self) -> Chain:
        """The base chain from which it is reached."""
        return self.table.chains[self.path[0]] if self.path else self.chain


def base_chains(tables: Iterable[Table], hook: Hook, family: Family) -> Iterator[tuple[Table, Chain]]:
    """What the kernel asks at a hook, in its order."""
    found = [
        (table, chain)
        for table in tables
        if table.concerns(family)
        for chain in table.chains.values()
        if chain.hook is hook
    ]
    return iter(sorted(found, key=lambda pair: pair[1].priority))
