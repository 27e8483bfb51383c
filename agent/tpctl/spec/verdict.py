"""What `decide()` answers: what happens to a connection, and which rules were consulted."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tpctl.spec.policy import Redirection


class Action(enum.StrEnum):
    """What happens to a connection."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    """tpctl changes nothing; rules of other software may still act."""
    REDIRECT = "redirect"
    DROP = "drop"
    RESET = "reset"
    """Refused at once: by a TCP RST, or for UDP by an ICMP message that the port is unreachable."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that was consulted, and whether it applied."""

    rule: str
    text: str
    applied: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to a connection, and the rules that were consulted, in order; the last that applied decided."""

    action: Action
    port: int | None
    """The data plane's port, when redirected."""
    zone: int
    """The conntrack zone of the packet."""
    steps: tuple[Step, ...]
    how: Redirection | None = None
    """The mechanism, when redirected."""

    @property
    def reason(self) -> str:
        """The rule that decided, in words."""
        return self._decisive.text

    @property
    def rule(self) -> str:
        """The name of the rule that decided."""
        return self._decisive.rule

    @property
    def _decisive(self) -> Step:
        return next(step for step in reversed(self.steps) if step.applied)
