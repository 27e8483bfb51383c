"""What a live probe is, how it ended, and what was found out where it was lost. Plain data."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpctl.spec.connection import Connection, Direction
from tpctl.spec.policy import DNS_PORT, Family
from tpctl.spec.verdict import Verdict


class Kind(enum.StrEnum):
    """A kind of redirection that a policy may have."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"
    SELF_CALL = "self-call"
    """The data plane calls this host's own address, which must cross the inbound listener (rule o3)."""
    DNS = "DNS"
    """A query of an application, over UDP or TCP."""
    VIRTUAL_NETWORK = "virtual network"
    """A connection of a container or VM behind a bridge (rule i2)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One real connection, and what should happen to it."""

    kind: Kind
    connection: Connection
    """As the hooks see its first packet, source port included: no other packet on the host has all of it."""
    expected: Verdict
    """What `decide()` says; probes are made of what a policy redirects, so it has a port."""

    @property
    def family(self) -> Family:
        """The IP family."""
        return self.connection.family

    @property
    def direction(self) -> Direction:
        """Which hook sees it first."""
        return self.connection.direction

    @property
    def name(self) -> str:
        """The probe in words, such as "outbound TCP over IPv4"."""
        what = str(self.kind)
        if self.kind is Kind.VIRTUAL_NETWORK:
            what += f" {self.connection.interface}{' DNS' if self.is_query else ''}"
        return f"{what} {self.connection.protocol.upper()} over IPv{self.family}"

    @property
    def is_query(self) -> bool:
        """Whether it asks a name server."""
        return self.connection.destination_port == DNS_PORT


class Fate(enum.StrEnum):
    """How a probe ended."""

    ARRIVED = "arrived"
    """The data plane got it, or the responder that stands for one where none listens."""
    REFUSED = "refused"
    """Somebody answered that nobody listens: a reset, or an ICMP error."""
    LOST = "lost"
    """No answer at all came within the time."""
    PASSED_BY = "passed by"
    """It went past the data plane, straight to its destination."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a probe."""

    fate: Fate
    seconds: float
    """How long that took."""
    detail: str
    """What was seen, in words."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a lost probe."""

    where: str
    """The hook, chain and rule that took the packet ("ip filter INPUT: -i veth+ -j DROP"), or the kernel's drop
    reason and what it means."""
    whose: str | None = None
    """Whose that looks like: ufw, firewalld, an administrator, ...; None where nothing tells."""
    remedy: str | None = None
    """One command in that software's own words that lets such connections arrive."""


@dataclass(frozen=True, slots=True)
class Result:
    """A probe, its end, and what was found out about it."""

    probe: Probe
    outcome: Outcome
    finding: Finding | None = None


Again = Callable[[Sequence[Probe]], list[tuple[Probe, Outcome]]]
"""Sends probes once more, all at once, while the devices of the first time still stand, and hands them back as they
were sent, with other source ports. Costs `PATIENCE_SECONDS` when one is lost again."""

PATIENCE_SECONDS = 0.5
"""How long an answer is waited for; on one machine it takes less than a millisecond."""
