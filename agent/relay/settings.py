"""What the relay is asked to do: listeners, and what holds for all of them. Frozen, complete, checked."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.relay.access import EVERYBODY, Access
from agent.relay.dns_settings import DnsSettings
from agent.relay.listen import Address, Listen
from agent.relay.networks import NONE, NetworkSet
from agent.relay.original_destination import Destination

MAX_WORKERS = 256
DEFAULT_DRAIN_SECONDS = 30.0


class Role(enum.StrEnum):
    """Which way the connections of a listener go."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"
    DNS = "dns"
    METRICS = "metrics"
    """No direction that a listener may be given: that of the relay's own figures."""


DIRECTIONS = (Role.INBOUND, Role.OUTBOUND, Role.DNS)


class Acceleration(enum.StrEnum):
    """Who else than this process moves bytes."""

    OFF = "off"
    SOCKMAP = "sockmap"
    """The kernel, those of long-lived connections with small messages (`agent.relay.acceleration`)."""


class Source(enum.StrEnum):
    """The address from which the relay dials."""

    PASSTHROUGH = "passthrough"
    """127.0.0.6 or ::6, by which the rules know the relay's inbound connections (o2)."""
    CLIENT = "client"
    """The client's own, which needs a redirection that brings the answers back (TPROXY)."""
    KERNEL = "kernel"
    """Whatever routing chooses."""


@dataclass(frozen=True, slots=True)
class OriginalDestination:
    """Dial where the client wanted to go."""


@dataclass(frozen=True, slots=True)
class FixedAddress:
    """Dial one address, wherever the client wanted to go."""

    destination: Destination


@dataclass(frozen=True, slots=True)
class ServicePorts:
    """Dial the services of a Kuma Dataplane; ports it does not name are dialled as they are."""

    services: Mapping[int, tuple[str | None, int]]
    """By the inbound's port: its service address (None: the address the client meant) and its service port."""


METRICS = "metrics"
"""The name under which the metrics are served."""

Upstream = OriginalDestination | FixedAddress | ServicePorts


@dataclass(frozen=True, slots=True)
class Limits:
    """Connections at the same time, over all workers; 0 is no limit."""

    connections: int = 0
    """Beyond it nothing is accepted: clients wait in the kernel's queue."""
    connections_per_source: int = 0
    """Beyond it the source's connections are reset."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds; 0 is none."""

    connect: float = 10.0
    """To reach the upstream, TLS included."""
    handshake: float = 10.0
    """For a client to send its PROXY protocol header and to finish its TLS handshake."""
    idle: float = 3600.0
    """Without a byte either way."""
    half_closed: float | None = None
    """Without a byte, once one side has ended; None: as `idle`."""


@dataclass(frozen=True, slots=True)
class TrustedSources:
    """Who is believed what a PROXY protocol header says."""

    networks: NetworkSet = NONE
    unix: bool = False

    def __contains__(self, host: object) -> bool:
        """Whether a peer is trusted; None stands for the peer of a unix socket."""
        return self.unix if host is None else host in self.networks

    def __bool__(self) -> bool:
        return self.unix or bool(self.networks)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How TLS of clients is terminated."""

    certificate: Path
    """PEM, the chain in order."""
    certificate_key: Path
    client_ca_file: Path | None = None
    verify_client: str = "off"
    """off, optional or on."""
    tls_verify_depth: int = 1


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How TLS to the upstream is originated."""

    ca_file: Path | None = None
    """None: the host's."""
    tls_verify: bool = True
    tls_verify_depth: int = 1
    server_name: str | None = None
    """Sent as SNI and looked for in the certificate; None: the upstream's IP address."""
    certificate: Path | None = None
    certificate_key: Path | None = None


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """One listener and what becomes of its connections."""

    name: str
    role: Role
    listen: Listen
    upstream: Upstream = OriginalDestination()
    source: Source = Source.KERNEL
    access: Access = EVERYBODY
    """Of sources for inbound and DNS, of destinations for outbound."""
    allow_metadata_addresses: bool = False
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    trusted_ips: TrustedSources = TrustedSources()
    send_proxy_protocol: int | None = None
    """1 or 2."""
    ssl: ServerTls | None = None
    upstream_tls: ClientTls | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything. `agent.relay.flags` and `agent.relay.config_file` make it."""

    listeners: tuple[ListenerSettings, ...] = ()
    dns: DnsSettings = field(default_factory=DnsSettings)
    workers: int = 1
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    access_log: bool = False
    metrics: Address | None = None
    limits: Limits = field(default_factory=Limits)
    """Over all listeners; only the total counts."""
    user: str | None = None
    accelerate: Acceleration = Acceleration.OFF

    @property
    def served(self) -> tuple[ListenerSettings, ...]:
        """The listeners, and that of the metrics."""
        if self.metrics is None:
            return self.listeners
        return (*self.listeners, ListenerSettings(METRICS, Role.METRICS, Listen(self.metrics)))
