"""How many connections Envoy may have with the descriptors that there are: neither runs out alone."""

from __future__ import annotations

import resource

A_CONNECTION = 3
"""Descriptors: the client's, the upstream's, and that of an upstream connection that is kept for the next request."""
RESERVED = 256
"""For Envoy itself: its files, its listening sockets, the admin interface. An eighth of few."""


def descriptors() -> int:
    """The most that a process started by this one may have: Envoy is given all of them."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hard


def room(limit: int) -> int:
    """The connections of clients for which so many descriptors are enough.

    >>> room(1024), room(524_288)
    (298, 174677)
    """
    return max(1, (limit - min(RESERVED, limit // 8)) // A_CONNECTION)


def connections(asked: int, default: int, limit: int) -> int:
    """How many are accepted at the same time, when a file asks for so many (0: it does not say)."""
    return min(asked or default, room(limit))


def shortage(asked: int, limit: int) -> str | None:
    """What is said when a file asks for more than there are descriptors for."""
    if asked <= room(limit):
        return None
    return (
        f"limits.connections: {asked} connections need more than the {limit} descriptors that there are, so only "
        f"{room(limit)} are accepted; raise LimitNOFILE= of the unit, or `ulimit -Hn`"
    )
