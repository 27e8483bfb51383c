"""What every engine offers.

An engine never decides anything: it carries out a `Policy` so that the kernel agrees with `agent.decide`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from agent.policy import Policy


@dataclass(frozen=True, slots=True)
class RuleCounter:
    """How often a rule of ours matched."""

    family: int
    table: str
    chain: str
    rule: str
    packets: int
    bytes: int


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
        """Exactly what the kernel will be given, as text, per family, with a comment a rule."""
        ...


P = TypeVar("P", bound=Plan)


class Engine(Protocol[P]):
    """One technology of redirection."""

    name: str

    def plan(self, policy: Policy) -> P:
        """The plan for a policy. Pure: reads nothing, changes nothing."""
        ...

    def apply(self, plan: P) -> Applied:
        """Replace whatever tpctl or kumactl installed by `plan`; all of it or nothing.

        Raises ApplyError when the kernel refused; everything is then as before.
        """
        ...

    def inspect(self, plan: P | None) -> Inspection:
        """What the kernel holds now, compared with `plan` when there is one."""
        ...

    def remove(self, *, dry_run: bool = False) -> Removal:
        """Remove what tpctl or kumactl installed, and nothing else; with `dry_run` only say what would go."""
        ...
