"""What happened to the DNS queries of one worker, as counters that only grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class DnsCounters:
    """Numbers of queries unless said otherwise."""

    udp: int = 0
    """Came over UDP."""
    tcp: int = 0
    """Came over TCP."""
    malformed: int = 0
    """Answered with FORMERR."""
    local: int = 0
    """Answered from the local zone."""
    forwarded: int = 0
    """Sent to a name server; equal ones at the same time count once."""
    failed: int = 0
    """Answered with SERVFAIL, for want of a name server or of room."""
    timeouts: int = 0
    """Tries on which a server kept silent."""
    mismatched: int = 0
    """Messages from a server's address that answer nothing that was asked."""
    reloads: int = 0
    """Zone files taken into use after the first."""
    rejected_reloads: int = 0
    """Zone files that were unusable, so that the one before stayed."""
