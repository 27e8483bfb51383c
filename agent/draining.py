"""Connections that run through the data plane when the redirection is removed may finish.

When the last user of NAT goes, the kernel drops its NAT and conntrack hooks, and redirected connections are reset. So
an empty table stays until they have ended (agent.engines.nftables.drain); any later command takes it away. The same
holds for connections that the data plane has dialled from its clients' addresses: a table that marks the answers stays,
with the rule and route of `agent.routing`.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent import routing
from agent.engines.nftables import drain, nft
from agent.engines.nftables.engine import NftablesEngine, load, still_running
from agent.engines.nftables.nft import Nft, NftError
from agent.errors import ApplyError, HostError


def hold(ports: Iterable[int]) -> tuple[str, ...]:
    """Before iptables rules go: let the connections they redirect to `ports` finish. Hands back notices."""
    engine = _engine()
    running = engine.hold(ports) if engine else 0
    return (still_running(running),) if running else ()


def tidy() -> int:
    """Remove what an earlier uninstall left, if nothing needs it any more; hands back how many connections still do."""
    engine = _engine()
    return (engine.drain_leftovers() or 0) if engine else 0


def hold_answers() -> int:
    """Before the rules of `--inbound-mode tproxy` go: let connections that were dialled from clients' addresses finish.

    Hands back how many there are; with none, nothing is left, and nobody needs `agent.routing` any more.
    """
    running = drain.dialled()
    way = _way() if running else None
    if way is None or _held(way):
        return running if way else 0
    try:
        way.execute(drain.answers_leftover())
    except NftError as refused:
        raise ApplyError(f"nf_tables refused the table {drain.ANSWERS_TABLE}: {refused}") from refused
    return running


def release_answers() -> None:
    """Remove the table that `hold_answers` left: an installation does its work again."""
    way = _way()
    if way and _held(way):
        _delete(way)


def tidy_answers() -> int:
    """Remove what `hold_answers` left once nothing needs it; hands back how many connections still do."""
    way = _way()
    if way is None or not _held(way):
        return 0
    running = drain.dialled()
    if not running:
        _delete(way)
        routing.remove()
    return running


def dialled_run(count: int) -> str:
    """What the operator is told about connections that are let finish."""
    connections = "connection runs" if count == 1 else "connections run"
    return (
        f"{count} {connections} from the data plane to applications in the name of clients, and may finish: until then "
        f"the table {drain.ANSWERS_TABLE} and the routing table {routing.TABLE} stay; `tpctl status` removes them "
        "after that"
    )


def _held(way: Nft) -> bool:
    try:
        return nft.held(way, drain.ANSWERS_TABLE) is not None
    except NftError:
        return False


def _delete(way: Nft) -> None:
    try:
        way.execute(f"delete table {drain.ANSWERS_TABLE}\n")
    except NftError as refused:
        raise ApplyError(f"nf_tables refused to remove table {drain.ANSWERS_TABLE}: {refused}") from refused


def _way() -> Nft | None:
    try:
        return nft.find()
    except HostError:
        return None


def _engine() -> NftablesEngine | None:
    try:
        return load()
    except HostError:
        return None  # without nf_tables nothing can be left, nor was it
