"""The door through which an engine joins the suite: a name, and how to get the engine ready in a host's namespace.

The suite asks nothing else of an engine than what `agent.engines.base.Engine` has: `plan` and `apply`. An engine that
needs more around it than a namespace (a cgroup for the processes that open sockets, say) gives a `surroundings`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from agent.engine_options import EngineOptions
from agent.engines.base import Engine
from agent.engines.registry import select


@dataclass(frozen=True, slots=True)
class Door:
    """How one engine is tested."""

    name: str
    load: Callable[[], Engine[Any]]
    """Called inside the host's namespace, once for each laboratory."""
    surroundings: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around everything that is done with the engine."""


def _through(options: EngineOptions) -> Callable[[], Engine[Any]]:
    return lambda: select(options).engine


DOORS = {
    door.name: door
    for door in (
        Door("nftables", _through(EngineOptions(engine="nftables"))),
        Door("iptables-nft", _through(EngineOptions(engine="iptables", iptables_mode="nft"))),
        Door("iptables-legacy", _through(EngineOptions(engine="iptables", iptables_mode="legacy"))),
    )
}
