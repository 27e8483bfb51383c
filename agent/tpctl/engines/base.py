"""The interface of every engine.

An engine never decides anything: it implements a `Policy` so that the kernel agrees with `tpctl.spec.decide`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import tpctl
from tpctl.spec.policy import Family, Policy


class RuleCounter(NamedTuple):
    """How often one of tpctl's rules matched."""

    family: int
    """4 or 6; 0 for a rule that serves both."""
    table: str
    chain: str
    rule: str
    packets: int
    bytes: int


class Figure(NamedTuple):
    """Something an engine counts, and how much of it there can be."""

    name: str
    value: int
    most: int | None = None


ROUTE_MARK = 0x1000
"""The bit of a packet's mark by which `tpctl.change.routing` brings it back to this host: an application's reply to a
client from whose address the data plane dialled (`--inbound-mode tproxy`)."""
ARRIVED_MARK = 0x1000
"""The bit of a connection's mark that says that TPROXY handed it to the data plane."""
DIALLED_MARK = 0x0800
"""The bit of a connection's mark that says that the data plane dialled it from a client's address."""

REDIRECTING = (
    "warning: NAT cannot change a port alone on this host, so inbound connections are redirected to the primary "
    "address of the interface by which they arrive; those that arrive by an interface without an address are dropped"
)
"""What an engine says where it has to use REDIRECT for what arrives."""

SIGNATURE = f"(tpctl {tpctl.__version__})"
"""The end of one rule's comment in every installation with comments: it shows who made the rules without a record."""
_SIGNATURE = re.compile(r"\(tpctl (\S+)\)$")


def signed_by(counters: Iterable[RuleCounter]) -> str | None:
    """The version of tpctl that made the rules, if they show it."""
    found = (_SIGNATURE.search(counter.rule) for counter in counters)
    return next((each[1] for each in found if each), None)


class Inspection(NamedTuple):
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
    foreign_families: tuple[int, ...] = ()
    """The IP families in which those have rules."""
    ahead: tuple[str, ...] = ()
    """Rules of others that keep connections from ours, and will not be overtaken: by the policy they come first."""
    redirected_ports: frozenset[int] = frozenset()
    """Where iptables' NAT rules of tpctl and kumactl redirect to."""
    figures: tuple[Figure, ...] = ()
    version: str | None = None
    """The version of tpctl that installed it, if the rules or programs show it."""
    registered: frozenset[int] | None = None
    """The sockets to which eBPF programs give what arrives, by cookie (SO_COOKIE, socket(7)); None without such."""
    way: str | None = None
    """How the rules are written to the kernel here, and why; set where there is a choice and --verbose is given."""
    listed: Mapping[str, Mapping[Family, Any]] | None = None
    """The tables as the programs of iptables listed them, by variant, family and name; None of other engines."""


class Applied(NamedTuple):
    """What an engine did beyond the request."""

    replaced: tuple[str, ...] = ()
    """Installations that were there before, in words."""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed, or would be."""

    removed: tuple[str, ...] = ()
    """One line per thing: a chain, a rule, an address."""
    notices: tuple[str, ...] = field(default=())


class Plan(Protocol):
    """Everything that an engine will do for a policy; a value, printed by --dry-run and carried out by apply."""

    def render(self) -> str:
        """What the kernel of a host without tpctl would be given, as text, with a comment for each rule."""
        ...


P = TypeVar("P", bound=Plan)

Footprint = Mapping[str, Any]
"""What an engine must know about the host before the first install, to restore it. JSON types; kept in the record."""


class Engine(Protocol[P]):
    """One redirection technology, ready for this host."""

    name: str

    @property
    def families(self) -> frozenset[Family]:
        """The families it can redirect on this host."""
        ...

    @property
    def variant(self) -> str | None:
        """The flavour of the technology, where there are several ("nft" or "legacy" iptables)."""
        ...

    @property
    def reason(self) -> str:
        """Why this engine and variant, for the operator."""
        ...

    def plan(self, policy: Policy) -> P:
        """The plan for a policy, as this host's kernel can carry it out. Changes nothing."""
        ...

    def unguarded(self, policy: Policy) -> str | None:
        """Why it cannot guard the data plane's ports under this policy on this host; None when it can."""
        ...

    def preview(self, policy: Policy) -> str:
        """Exactly what `apply` would give the kernel on this host now, as text. Reads, and changes nothing."""
        ...

    def footprint(self) -> Footprint:
        """What `remove` needs to know about the host as it was before the first install."""
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

        With `draining`, connections through the data plane may finish. A caller that has put another engine's rules in
        place does not need it: those rules keep the connections alive.
        """
        ...
