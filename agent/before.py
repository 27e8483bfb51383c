"""What stood in this network namespace before a change that has to be confirmed: all that the way back needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent import state
from agent.errors import InputError


@dataclass(frozen=True, slots=True)
class Before:
    """Either tpctl's own record, or kumactl's rules as they were, or nothing."""

    record: state.State | None = None
    holdings: Mapping[str, Any] = field(default_factory=dict)
    """What `agent.engines.iptables.snapshot` took; JSON types."""


def take(record: state.State | None) -> Before:
    """See what is there. Raises InputError when there would be no way back to it."""
    from agent.engine_options import EngineOptions
    from agent.engines import registry
    from agent.engines.iptables import snapshot

    if record:
        return Before(record)
    if any(engine.inspect(None).installed for engine in registry.available(EngineOptions())):
        raise InputError(
            "rules of tpctl are installed, but there is no record of the policy, and so no way back to it: "
            "run `tpctl install` once without --confirm-within"
        )
    return Before(None, snapshot.take())


def document_of(before: Before) -> dict[str, Any]:
    """As JSON types."""
    record = state.document_of(before.record) if before.record else None
    return {"record": record, "holdings": dict(before.holdings)}


def of_document(document: Mapping[str, Any]) -> Before:
    """What `document_of` made. Raises ValueError, KeyError or TypeError."""
    record = state.of_document(document["record"]) if document["record"] else None
    return Before(record, dict(document["holdings"]))
