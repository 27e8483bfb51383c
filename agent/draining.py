"""Connections that run through the data plane when the redirection is removed may finish.

When the last user of NAT goes, the kernel drops its NAT and conntrack hooks, and redirected connections are reset. So
an empty table stays until they have ended (agent.engines.nftables.drain); any later command takes it away.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.engines.nftables.engine import NftablesEngine, load, still_running
from agent.errors import HostError


def hold(ports: Iterable[int]) -> tuple[str, ...]:
    """Before iptables rules go: let the connections they redirect to `ports` finish. Hands back notices."""
    engine = _engine()
    running = engine.hold(ports) if engine else 0
    return (still_running(running),) if running else ()


def tidy() -> int:
    """Remove what an earlier uninstall left, if nothing needs it any more; hands back how many connections still do."""
    engine = _engine()
    return (engine.drain_leftovers() or 0) if engine else 0


def _engine() -> NftablesEngine | None:
    try:
        return load()
    except HostError:
        return None  # without nf_tables nothing can be left, nor was it
