"""What every engine offers.

An engine never decides anything: it carries out a `Policy` so that the kernel agrees with `agent.decide`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import agent
from agent.policy import Policy


@dataclass(frozen=True, slots=True)
class RuleCounter:
    """How often a rule of ours matched."""

    family: int
    """4 or 6; 0 for a rule that serves both."""
    table: str
    chain: str
    rule: str
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Figure:
    """Something an engine counts, and how much of it there can be."""

    name: str
    value: int
    most: int | None = None


ROUTE_MARK = 0x1000
"""The bit of a packet's mark by which `agent.routing` brings it back to this host: an application's answer to a client
in whose name the data plane dialled (`--inbound-mode tproxy`)."""
ARRIVED_MARK = 0x1000
"""The bit of a connection's mark that says that TPROXY handed it to the data plane."""
DIALLED_MARK = 0x0800
"""The bit of a connection's mark that says that the data plane dialled it from a client's address."""

SIGNATURE = f"(tpctl {agent.__version__})"
"""What one rule's comment ends with, in every installation that has comments: who made it is known without a record."""
_SIGNATURE = re.compile(r"\(tpctl (\S+)\)$")


def signed_by(counters: Iterable[RuleCounter]) -> str | None:
    """The version of tpctl that made the rules, where they tell."""
    found = (_SIGNATURE.search(counter.rule) for counter in counters)
    return next((each[1] for each in found if each), None)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the kernel holds, compared with a plan."""

    engine: str
    variant: str | None
    """For the iptables engine "nft" or "legacy"."""
    installed: bool
    families: tuple[int, ...] = ()
    drift: tuple[str, ...] = ()
    """A unified diff from the plan to the kernel, line by line; empty when they agree."""
    counters: tuple[RuleCounter, ...] = ()
    foreign: tuple[str, ...] = ()
    """Installations of other tools (kumactl) found, in words."""
    redirected_ports: frozenset[int] = frozenset()
    """Where iptables' NAT rules of tpctl and kumactl redirect to."""
    figures: tuple[Figure, ...] = ()
    version: str | None = None
    """The tpctl that installed it, as far as what is installed tells."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What an engine did besides what it was asked for."""

    replaced: tuple[str, ...] = ()
    """Installations that stood there before, in words."""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removal:
    """What was taken away, or would be."""

    removed: tuple[str, ...] = ()
    """One line per thing: a chain, a rule, an address."""
    notices: tuple[str, ...] = field(default=())


class Plan(Protocol):
    """An engine's complete intention for a policy; a value, printed by --dry-run and carried out by apply."""

    def render(self) -> str:
        """What the kernel of a host without tpctl would be given, as text, with a comment a rule."""
        ...


P = TypeVar("P", bound=Plan)

Footprint = Mapping[str, Any]
"""What an engine must know of the host before the first install, to leave it so. JSON types; kept in the record."""


class Engine(Protocol[P]):
    """One technology of redirection, ready for this host."""

    name: str

    @property
    def variant(self) -> str | None:
        """The flavour of the technology, where there are several ("nft" or "legacy" iptables)."""
        ...

    @property
    def reason(self) -> str:
        """Why this engine and variant, for the operator."""
        ...

    def plan(self, policy: Policy) -> P:
        """The plan for a policy. Pure: reads nothing, changes nothing."""
        ...

    def preview(self, policy: Policy) -> str:
        """Exactly what `apply` would give the kernel on this host now, as text. Reads, and changes nothing."""
        ...

    def footprint(self) -> Footprint:
        """What `remove` needs to know of the host as it was before the first install."""
        ...

    def apply(self, plan: P) -> Applied:
        """Replace whatever this engine (or kumactl through the same technology) installed by `plan`; all or nothing.

        Raises ApplyError when the kernel refused; everything is then as before.
        """
        ...

    def inspect(self, plan: P | None) -> Inspection:
        """What the kernel holds now, compared with `plan` when there is one."""
        ...

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Remove what this engine (or kumactl) installed, and nothing else; with `dry_run` only say what would go.

        With `draining`, connections that run through the data plane are let finish. A caller that has put another
        engine's rules in place does without it: those keep the connections alive.
        """
        ...
