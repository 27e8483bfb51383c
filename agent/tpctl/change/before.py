"""What stood in this network namespace before a change: all that the way back to it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpctl.change import loopback
from tpctl.host import interfaces
from tpctl.record import state
from tpctl.system.errors import InputError


@dataclass(frozen=True, slots=True)
class Before:
    """Either tpctl's own record, or kumactl's rules as they were, or nothing."""

    record: state.State | None = None
    holdings: Mapping[str, Any] = field(default_factory=dict)
    """What `tpctl.engines.snapshot` took; JSON types."""
    address: str | None = None
    """Beside kumactl's rules: whose ::6 was, as `tpctl.change.loopback.owner` says it."""

    def __str__(self) -> str:
        """In words."""
        if self.record:
            return f"the policy installed at {self.record.installed_at}, by {self.record.options.engine}"
        if self.holdings:
            from tpctl.engines import snapshot

            return snapshot.described(self.holdings)
        return "nothing"


def take(record: state.State | None) -> Before:
    """See what is there. Raises InputError when there would be no way back to it."""
    from tpctl.engines import registry
    from tpctl.spec.engine_options import EngineOptions

    if record:
        return Before(record)
    if any(engine.inspect(None).installed for engine in registry.available(EngineOptions())):
        raise InputError(
            "rules of tpctl are installed, but there is no record of the policy, and so no way back to it: "
            "run `tpctl install` once without --confirm-within"
        )
    return unrecorded()


def unrecorded() -> Before:
    """See what is there that is on no record: rules in iptables, and the address beside them."""
    from tpctl.engines import presence

    if not presence.may_hold_rules():
        return Before()
    from tpctl.engines import snapshot

    holdings = snapshot.take()
    return Before(None, holdings, loopback.owner(_interface()) if holdings else None)


def put_back(before: Before, footprint: Mapping[str, Any] | None) -> None:
    """Put kumactl's rules, and the address they want, back to where they were, in place of tpctl's in iptables.

    Rules of tpctl's other engines stay. Raises ApplyError or HostError when it cannot be done: the rules are then as
    they were.
    """
    from tpctl.engines import snapshot

    loopback.bring_back(_interface(), before.address)
    snapshot.restore(before.holdings, footprint)


def _interface() -> str:
    return interfaces.loopback_name() or "lo"


def document_of(before: Before) -> dict[str, Any]:
    """As JSON types."""
    record = state.document_of(before.record) if before.record else None
    return {"record": record, "holdings": dict(before.holdings), "address": before.address}


def of_document(document: Mapping[str, Any]) -> Before:
    """What `document_of` made. Raises ValueError, KeyError or TypeError."""
    record = state.of_document(document["record"]) if document["record"] else None
    return Before(record, dict(document["holdings"]), document.get("address"))
