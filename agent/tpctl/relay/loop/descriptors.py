"""Who may have how many of a process's descriptors, so that no direction takes what another one needs."""

from __future__ import annotations

import os
import resource
import sys

from tpctl.relay.loop.shares import Shares

INBOUND, OUTBOUND, OUTBOUND_OF_OTHERS, DNS, DNS_OF_OTHERS, SPARE = range(6)
"""Connections that come to this host; those that it makes itself, and those that other hosts make through it (virtual
networks); queries and DNS connections of both; and what the relay could do without: pipes, ports that it keeps."""
A_CONNECTION = 2
"""Descriptors: the client's and the upstream's."""
_MOST_DNS = 1536
"""A worker has no use for more: queries that wait, and connections with their upstreams."""
_PARTS = {INBOUND: 8, OUTBOUND: 8, DNS: 16, DNS_OF_OTHERS: 32}
"""What is kept for each: this part of all. Nothing for connections of others, so that none of them can be accepted in
the place of one of ours when there is room for no more of ours."""
_LEAST = ((3 * A_CONNECTION, {INBOUND: A_CONNECTION, OUTBOUND: A_CONNECTION}), (7, {DNS: 1}), (12, {DNS: 3}))
"""When there are so many at all, at least this is kept: a connection each way; a query; another one over TCP."""
_UNCOUNTED = 32
"""Descriptors for what is not counted: metrics, a file that is read, a question to the kernel. An eighth of few."""


def budget() -> Shares:
    """The descriptors that this process may still open, from its limit and what is open now."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return shares_of(soft, _open_now())


def unlimited() -> Shares:
    """As many as anybody wants."""
    return Shares(sys.maxsize, [0] * (SPARE + 1))


def shares_of(limit: int, used: int) -> Shares:
    """How the descriptors below a limit are divided when some are used already. A few are kept even of very few."""
    left = max(0, limit - used)
    left -= min(_UNCOUNTED, left // 8)
    kept = {use: left // part // A_CONNECTION * A_CONNECTION for use, part in _PARTS.items()}
    for enough, least in _LEAST:
        if left >= enough:
            kept.update({use: max(kept[use], count) for use, count in least.items()})
    kept[DNS], kept[DNS_OF_OTHERS] = min(kept[DNS], _MOST_DNS), min(kept[DNS_OF_OTHERS], _MOST_DNS)
    return Shares(left, [kept.get(use, 0) for use in range(SPARE + 1)])


def _open_now() -> int:
    """How many descriptors this process has; a guess without /proc."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a path would be made of each
    except OSError:
        return _UNCOUNTED
