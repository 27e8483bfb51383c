"""Whether this process may change the network."""

from __future__ import annotations

import os

from tpctl.system.errors import HostError


def require_root(what: str) -> None:
    """Raise HostError unless this is root; `what` names the command that needs it."""
    if os.geteuid() != 0:
        # Without root, only an install can say what it would do: an uninstall has to read the kernel's rules for that.
        look = ", or add --dry-run to look" if what == "tpctl install" else ""
        raise HostError(f"{what} reads or changes the kernel's rules and needs root: run it with sudo{look}")
