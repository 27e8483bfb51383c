"""What a connection is told when it begins: what all of a worker share, and what becomes of this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tpctl.relay.connections.acceleration import Accelerator
from tpctl.relay.connections.dialling import Dialling, Exchange
from tpctl.relay.connections.dials import Dial
from tpctl.relay.connections.ends import TlsEnd
from tpctl.relay.connections.handshake import Handshake
from tpctl.relay.connections.pump import PipePool
from tpctl.relay.connections.tls import Tls
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.settings.listen import Keepalive


class Context(NamedTuple):
    """What all connections of a worker share."""

    exchange: Exchange
    pool: PipePool
    buffer: memoryview
    accelerator: Accelerator | None = None


class UpstreamTls(NamedTuple):
    """How TLS to an upstream is begun."""

    tls: Tls
    deadlines: Deadlines[Handshake]


class Plan(NamedTuple):
    """What becomes of a connection."""

    dials: Sequence[Dial]
    deadlines: Deadlines[Dialling]
    idle: float = 0.0
    """Seconds without a byte, after which it ends; 0 is for ever."""
    half_closed: float = 0.0
    """The same once one side has ended."""
    keepalive: Keepalive | None = None
    """Of both sides, once one has ended or does not take what the other sends."""
    header: bytes = b""
    """What the upstream is told first."""
    client: TlsEnd | None = None
    """The client's end, if there is TLS on it."""
    upstream_tls: UpstreamTls | None = None
    reached: Callable[[float], None] | None = None
    """Told when an upstream is reached, by time.monotonic()."""
