"""From eBPF programs to netfilter's rules, or back: for a moment both are there, and neither knows the other's work.

A connection that the programs redirect reaches netfilter as one that was opened to the data plane's port, and one
that NAT has redirected reaches the programs as such. Either guard (g1) would reset it. So the guards stand aside until
one of the two has gone.

For as long as conntrack remembers a query that NAT has redirected, an answer of the data plane to another one from the
same port looks like its answer, and would be translated. So conntrack forgets those that have been answered.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

from tpctl.change.before import Before
from tpctl.engines import registry
from tpctl.engines.base import Applied, Engine
from tpctl.host import conntrack
from tpctl.record.state import State
from tpctl.spec.policy import Policy
from tpctl.system.errors import HostError

_PROGRAMS = "ebpf"
_LIMIT_SECONDS = 3.0
"""For conntrack to forget. An entry takes some tens of microseconds; what is left costs an answer, if any."""


def is_crossing(engine: Engine[Any], stood: Before) -> bool:
    """Whether what stood there before and `engine` are of the two kinds."""
    if stood.record:
        return runs_programs(stood.record) != (engine.name == _PROGRAMS)
    return bool(stood.holdings) and engine.name == _PROGRAMS


def runs_programs(record: State) -> bool:
    """Whether it is the eBPF engine that a record speaks of. It is never chosen unless it is named."""
    return record.options.engine == _PROGRAMS


def engine_of(record: State) -> Engine[Any] | None:
    """The engine of a record; None where it does not work any more."""
    try:
        return registry.select(record.options).engine
    except HostError:
        return None


def unguarded(policy: Policy) -> Policy:
    """The same without the guard."""
    return replace(policy, guard_ports=False)


def put_guard_aside(record: State | None) -> bool:
    """Take the guard of what is on record away, if it has one; whether it had."""
    if record is None or not record.policy.guard_ports or (engine := engine_of(record)) is None:
        return False
    carry_out(engine, unguarded(record.policy))
    return True


def put_guard_back(record: State | None) -> None:
    """Carry the policy on record out as it is."""
    if record is not None and (engine := engine_of(record)) is not None:
        carry_out(engine, record.policy)


def carry_out(engine: Engine[Any], policy: Policy) -> Applied:
    """Have an engine carry a policy out."""
    return engine.apply(engine.plan(policy))


def carry_out_across(engine: Engine[Any], policy: Policy) -> Applied:
    """The same in a crossing: queries that NAT has redirected are forgotten when no more can come."""
    if engine.name != _PROGRAMS:
        _forget_answered(policy)
    applied = carry_out(engine, policy)
    if engine.name == _PROGRAMS:
        _forget_answered(policy)
    return applied


def _forget_answered(policy: Policy) -> None:
    with contextlib.suppress(OSError):
        conntrack.forget_answered(policy.dns.port, deadline=time.monotonic() + _LIMIT_SECONDS)
