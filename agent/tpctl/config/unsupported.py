"""The inputs of kumactl that tpctl does not have."""

from __future__ import annotations

from typing import NamedTuple


class Unsupported(NamedTuple):
    """An input of kumactl that tpctl refuses when it is used, rather than ignoring it."""

    key: str | None
    variable: str
    reason: str
    is_bool: bool = False
    """Saying false, which is what leaving it out means, is no use of it."""


_ONE_CHAIN_NAME = "tpctl's chain names cannot be changed: status and uninstall recognise its rules by them"

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "redirect.inbound.excludePortsForUIDs", "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS",
        "packets that arrive have no owner, so inbound connections cannot be excluded by uid; "
        "use redirect.inbound.excludePorts or redirect.inbound.excludePortsForIPs",
    ),
    Unsupported(
        "cniMode", "CNI_MODE",
        "tpctl is a host agent and does not run as a CNI plugin; leave cniMode out", is_bool=True,
    ),
    *(
        Unsupported(None, f"REDIRECT_{direction}_{chain}", _ONE_CHAIN_NAME)
        for direction in ("INBOUND", "OUTBOUND")
        for chain in ("CHAIN_NAME", "REDIRECT_CHAIN_NAME")
    ),
)  # fmt: skip
