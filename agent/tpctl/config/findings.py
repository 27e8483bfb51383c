"""What comes up while a configuration is resolved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Findings:
    """Problems, which make it unusable, and notices, of which those that begin with "warning: " need attention."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Add a notice that needs attention."""
        self.notices.append(f"warning: {text}")
