"""Reads how often each rule decided, from the per-CPU array of bpf/types.c."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tpctl.bpf import syscall
from tpctl.engines.base import RuleCounter

_POSSIBLE = Path("/sys/devices/system/cpu/possible")
_FAMILIES = (4, 6)

RULES = (
    ("", ""),
    ("inbound", "g1 refused: opened to the data plane's own ports"),
    ("outbound", "g1 refused: opened to the data plane's own ports"),
    ("outbound", "s1 passed: a link-local destination"),
    ("outbound", "d1 passed: bound to an interface"),
    ("inbound", "l1 passed: a loopback address, by another interface"),
    ("inbound", "i3 passed: inbound redirection is off"),
    ("inbound", "i4 passed: an excluded source"),
    ("inbound", "i5 redirected: an included port"),
    ("inbound", "i5 passed: not an included port"),
    ("inbound", "i6 passed: an excluded port"),
    ("inbound", "i7 redirected"),
    ("inbound", "p2 passed: UDP"),
    ("dns", "d0 passed: UDP other than captured DNS"),
    ("outbound", "x1 passed: an excluded user"),
    ("outbound", "x2 passed: an excluded destination"),
    ("dns", "d2 passed: the data plane's own query"),
    ("dns", "d3 redirected"),
    ("dns", "d4 redirected: over TCP"),
    ("dns", "x4 passed: over TCP"),
    ("outbound", "o0 passed: outbound redirection is off"),
    ("outbound", "o1 passed: an excluded port"),
    ("outbound", "o2 passed: the data plane reaches the application"),
    ("outbound", "o3 redirected: the data plane calls this host"),
    ("outbound", "o4 passed: to this host itself"),
    ("outbound", "o5 passed: the data plane's own connection"),
    ("outbound", "o6 passed: to the loopback address"),
    ("outbound", "o7 redirected"),
    ("outbound", "o7 passed: not an included port"),
    ("inbound", "bypassed: the data plane does not listen"),
    ("inbound", "refused: the data plane does not listen"),
    ("outbound", "bypassed: the data plane does not listen"),
    ("dns", "bypassed: the data plane does not listen"),
    ("outbound", "m1 passed: an excluded mark"),
)
"""Direction and text, in the order of `enum rule` in bpf/types.c."""


def possible_cpus(text: str) -> int:
    """How many values a per-CPU entry has, from /sys/devices/system/cpu/possible ("0-3,8")."""
    return 1 + max(int(part.rpartition("-")[2]) for part in text.strip().split(","))


def read_counters(map_fd: int) -> Iterator[RuleCounter]:
    """Every rule that decided a connection at least once. Raises OSError."""
    cpus = possible_cpus(_POSSIBLE.read_text(encoding="ascii"))
    for number, (direction, text) in enumerate(RULES):
        for position, family in enumerate(_FAMILIES):
            raw = syscall.lookup(map_fd, struct.pack("=I", number * len(_FAMILIES) + position), 8 * cpus)
            total = sum(struct.unpack(f"={cpus}Q", raw)) if raw else 0
            if total:
                yield RuleCounter(family, "ebpf", direction, text, total, 0)
