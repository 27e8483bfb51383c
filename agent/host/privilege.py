"""Whether this process may change the network."""

from __future__ import annotations

import os

from agent.errors import HostError


def require_root(what: str) -> None:
    """Raise HostError unless this is root; `what` names the command that needs it."""
    if os.geteuid() != 0:
        raise HostError(f"{what} changes the kernel's rules and needs root: run it with sudo, or add --dry-run to look")
