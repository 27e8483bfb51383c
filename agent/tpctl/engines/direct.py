"""The iptables rules of a policy as arguments with priorities, which firewalld keeps (firewalld.direct(5))."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tpctl.engines.iptables.parts import TableRules
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.engines.iptables.rule import split
from tpctl.engines.iptables.saved import KUMA_CHAINS, OWN_CHAINS, owner_of_chain, owner_of_words
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Cgroup, Policy

FIRST, LAST = -10000, 10000
"""Priorities of rules that tpctl would put before, or behind, everything else in a built-in chain; others' are 0."""
MARKS = (OWN_CHAINS, KUMA_CHAINS)
"""One of them is in every rule or chain that is tpctl's or kumactl's."""


class Chain(NamedTuple):
    """A chain to be made."""

    ipv: str
    """"ipv4" or "ipv6"."""
    table: str
    name: str


class Rule(NamedTuple):
    """A rule, and its place among those of its chain."""

    chain: Chain
    priority: int
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DirectRules:
    """Everything that firewalld has to keep for a policy."""

    chains: tuple[Chain, ...]
    rules: tuple[Rule, ...]
    cgroup: Cgroup | None = None
    """The control group that rules name by its path."""


def of_policy(policy: Policy, options: EngineOptions) -> DirectRules:
    """The rules that the iptables engine would install."""
    return of_plan(IptablesPlan.of_policy(policy, options))


def of_plan(plan: IptablesPlan) -> DirectRules:
    """The same of a plan."""
    tables = [(f"ipv{int(rules.family)}", table) for rules in plan.families for table in rules.tables]
    chains = tuple(Chain(ipv, table.table, name) for ipv, table in tables for name, _ in table.chains)
    rules = tuple(rule for ipv, table in tables for rule in _rules(ipv, table, plan.comments))
    return DirectRules(chains, rules, plan.cgroup)


def is_ours(chain: str, arguments: str) -> bool:
    """Whether a chain, or a rule in it, is tpctl's or kumactl's. firewalld splits arguments as a shell does."""
    if owner_of_chain(chain):
        return True
    try:
        words = shlex.split(arguments)
    except ValueError:
        return False
    return owner_of_words((word, False) for word in words) is not None


def _rules(ipv: str, table: TableRules, comments: bool) -> Iterator[Rule]:
    for chain, rules in table.chains:
        for priority, rule in enumerate(rules):
            yield Rule(Chain(ipv, table.table, chain), priority, _words(rule.render(comments=comments)))
    for order, jump in enumerate(table.jumps):
        priority = LAST + order if jump.position is None else FIRST + jump.position
        yield Rule(Chain(ipv, table.table, jump.chain), priority, _words(jump.rule.render(comments=comments)))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word, _ in split(text))
