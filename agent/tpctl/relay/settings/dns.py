"""What the relay's DNS side is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_ZONE = "mesh"


@dataclass(frozen=True, slots=True)
class DnsSettings:
    """Where queries go, and which of them the relay answers itself."""

    resolv_conf: Path = Path("/etc/resolv.conf")
    """The name servers that queries are forwarded to."""
    zone_file: Path | None = None
    """The names of the local zone: YAML when it ends in .yaml or .yml, otherwise as hosts(5). None: no local zone."""
    zone: str = DEFAULT_ZONE
    """The domain whose names are the file's alone."""
