"""Tables of nftables without a redirect, which let connections through the data plane finish when the rules are gone.

Any engine may need them, so they are asked for here. Without nf_tables nothing can be left, nor was it. The nftables
engine is imported only where there is something to do for it: with another engine that is seldom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from tpctl.engines import presence
from tpctl.engines.nftables import drain, nft
from tpctl.engines.nftables.nft import Nft, NftError
from tpctl.engines.nftables.table import TABLE
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system.errors import ApplyError, HostError

if TYPE_CHECKING:
    from tpctl.engines.nftables.engine import NftablesEngine

ANSWERS_TABLE = drain.ANSWERS_TABLE
"""Marks the answers to connections that the data plane dialled on behalf of clients."""


def hold(ports: Collection[int]) -> tuple[str, ...]:
    """Before iptables rules go: let the connections they redirect to `ports` finish. Hands back notices."""
    engine = _engine() if drain.running(ports) else None
    running = engine.hold(ports) if engine else 0
    if not running:
        return ()
    from tpctl.engines.nftables.engine import still_running

    return (still_running(running),)


def redirected() -> int:
    """How many redirected connections a table that was left is there for."""
    way = None if presence.lacks(TABLE) else _way()
    if way is None:
        return 0
    from tpctl.engines.nftables.engine import NftablesEngine

    return NftablesEngine(way, EngineOptions()).leftovers() or 0


def end() -> int:
    """Remove the table that was left, once its connections have ended; hands back how many still run."""
    engine = None if presence.lacks(TABLE) else _engine()
    return (engine.drain_leftovers() or 0) if engine else 0


def hold_answers(policy: Policy | None) -> None:
    """Before the rules of `--inbound-mode tproxy` go: let connections dialled from clients' addresses finish.

    `policy` is the one that goes, if it is known. Raises ApplyError.
    """
    way = _way()
    if way is None or _holds_answers(way):
        return
    try:
        way.execute(drain.answers_leftover(policy))
    except NftError as refused:
        raise ApplyError(f"nf_tables refused the table {ANSWERS_TABLE}: {refused}") from refused


def holds_answers() -> bool:
    """Whether that table is there, as far as can be seen."""
    way = _way()
    return way is not None and _holds_answers(way)


def release_answers() -> None:
    """Remove the table that `hold_answers` left. Raises ApplyError."""
    way = _way()
    if way is None or not _holds_answers(way):
        return
    try:
        way.execute(f"delete table {ANSWERS_TABLE}\n")
    except NftError as refused:
        raise ApplyError(f"nf_tables refused to remove table {ANSWERS_TABLE}: {refused}") from refused


def answered() -> int:
    """How many connections the table that `hold_answers` left is there for."""
    way = _way()
    return drain.dialled() if way and _holds_answers(way) else 0


@contextlib.contextmanager
def conntrack_at_work() -> Iterator[None]:
    """Keep conntrack's hooks for the length of the block; a tpctl that is killed leaves a table that ends by itself."""
    try:
        way = nft.find()
        is_free = nft.held(way, TABLE) is None
        if is_free:
            way.execute(drain.leftover(None))
    except (HostError, NftError):
        is_free = False
    try:
        yield
    finally:
        if is_free:
            with contextlib.suppress(HostError, NftError):
                way.execute(f"delete table {TABLE}\n")


def _holds_answers(way: Nft) -> bool:
    try:
        return nft.held(way, ANSWERS_TABLE) is not None
    except NftError:
        return False


def _way() -> Nft | None:
    try:
        return nft.find()
    except HostError:
        return None


def _engine() -> NftablesEngine | None:
    from tpctl.engines.nftables.engine import load

    try:
        return load()
    except HostError:
        return None
