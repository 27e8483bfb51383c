"""What `tpctl status` tells of the programs at work: connections by outcome, listeners, and how full the maps are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tpctl.bpf import syscall
from tpctl.engines.base import Figure, RuleCounter
from tpctl.engines.ebpf import listeners
from tpctl.engines.ebpf.installed import Installed

OUTCOMES = ("redirected", "bypassed", "refused", "passed")
_MAPS = {
    "in_flight": "being accepted",  # between a SYN and what the data plane accepts
    "networks": "excluded networks",
    "users": "excluded users",
    "servers": "captured name servers",
}
_SOCKETS = 2 * listeners.SLOTS


def figures(found: Installed, counters: Iterable[RuleCounter]) -> Iterator[Figure]:
    """The figures of an installation, from its open maps and its rules' counters. Raises OSError."""
    yield from outcomes(counters)
    waiting = found.maps.get("listeners")
    if waiting is not None:
        yield Figure("inbound listeners", len(listeners.registered(waiting)), _SOCKETS)
    for name, meaning in _MAPS.items():
        descriptor = found.maps.get(name)
        if descriptor is not None:
            shape = syscall.map_info(descriptor).shape
            held = sum(1 for _ in syscall.keys(descriptor, shape.key_size))
            if held or name == "in_flight":
                yield Figure(meaning, held, shape.max_entries)


def outcomes(counters: Iterable[RuleCounter]) -> Iterator[Figure]:
    """How many connections (and datagrams) of each direction met which outcome."""
    totals: dict[tuple[str, str], int] = {}
    for counter in counters:
        outcome = next(word for word in OUTCOMES if word in counter.rule)
        key = (counter.chain, outcome)
        totals[key] = totals.get(key, 0) + counter.packets
    for (direction, outcome), total in sorted(totals.items()):
        yield Figure(f"{direction} {outcome}", total)
