"""What is to be run, as the file says it. Frozen; a reload makes another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.envoy.documents import Documents
from tpctl.relay.settings.model import DEFAULT_DRAIN_SECONDS, Settings


@dataclass(frozen=True, slots=True)
class Wanted:
    """A configuration that is in order."""

    documents: Documents
    """Their secrets name the files in which the administrator keeps them."""
    watched: tuple[Path, ...]
    """The file itself, and every file that it refers to: when one of them changes, everything is read again."""
    connections: int
    """The most that are accepted at the same time, as the documents say."""
    workers: int = 1
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    located: Callable[[str], str] = str
    """What Envoy says of the documents, after the key that it is about."""
    dns: Settings = field(default_factory=Settings)
    """What the relay answers beside Envoy; nothing without listeners."""
    warnings: tuple[str, ...] = ()
    """What works, and may not be what was meant."""


Load = Callable[[], Wanted]
"""Reads the file again. Raises TpctlError when it is not in order."""
Complaint = Callable[[Documents], str | None]
"""Asks Envoy itself about documents; None when it takes them. Raises TpctlError when it cannot be asked."""
