"""Where a relayed connection stands, and why it ended."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """Where a connection stands; it only goes forward."""

    DIALLING = enum.auto()
    """The client is accepted, and not read: nobody could take what it says."""
    SHAKING_HANDS = enum.auto()
    """The upstream is reached, and has to show its certificate."""
    RELAYING = enum.auto()
    HALF_CLOSED = enum.auto()
    """One side has sent its end, and the other has been told."""
    ENDED = enum.auto()


class Ending(enum.StrEnum):
    """Why a connection ended, as the access log says it."""

    CLOSED = "closed"
    UPSTREAM_TLS = "the TLS handshake with the upstream failed"
    CLIENT_RESET = "reset by the client"
    UPSTREAM_RESET = "reset by the upstream"
    NOT_REACHED = "the upstream was not reached"
    IDLE = "idle for too long"
    HALF_CLOSED = "half-closed for too long"
    TERMINATED = "ended by the relay"
    FAILED = "an error of the relay's own"
