"""What the relay is asked to do: listeners, and what holds for all of them. Frozen, complete, checked."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.relay.loop.networks import NONE, NetworkSet
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.access import EVERYBODY, Access
from tpctl.relay.settings.dns import DnsSettings
from tpctl.relay.settings.listen import Address, Listen

MAX_WORKERS = 256
DEFAULT_DEPTH = 1
"""Intermediate certificates that are allowed between a certificate and a trusted one."""
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
    """The kernel, those of long-lived connections with small messages (`tpctl.relay.connections.acceleration`)."""


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
    file: Path | None = None
    """The Dataplane."""

    def of(self, port: int) -> tuple[str | None, int]:
        """What to dial for a port: an address, or None, and a port."""
        return self.services.get(port, (None, port))


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
    x_forwarded_for: NetworkSet | None = None
    """Who is believed what X-Forwarded-For says, where that was told apart; None: the same networks."""

    @property
    def forwarders(self) -> NetworkSet:
        """Whose X-Forwarded-For names the client."""
        return self.networks if self.x_forwarded_for is None else self.x_forwarded_for

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
    tls_verify_depth: int = DEFAULT_DEPTH


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How TLS to the upstream is originated."""

    ca_file: Path | None = None
    """None: the host's."""
    tls_verify: bool = True
    tls_verify_depth: int | None = None
    """None: not given, which the relay takes as `DEFAULT_DEPTH`."""
    server_name: str | None = None
    """Sent as SNI and looked for in the certificate; None: the upstream's IP address."""
    certificate: Path | None = None
    certificate_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret is: a file, or one of systemd's credentials (systemd.exec(5), LoadCredential=). Never itself."""

    file: Path | None = None
    credential: str | None = None


class ServiceProtocol(enum.StrEnum):
    """How far a service's connections are understood."""

    TCP = "tcp"
    HTTP = "http"
    DETECT = "detect"
    """HTTP if the client's first bytes are, else TCP: so nothing may depend on which."""


@dataclass(frozen=True, slots=True)
class OriginVerify:
    """A header that every request must have, with one of several secrets; it is not passed on."""

    header: str
    secrets: tuple[str, ...]
    """Names in `Settings.secrets`: two while one replaces the other."""


@dataclass(frozen=True, slots=True)
class Jwt:
    """A token that every request must have (RFC 7519), as `Authorization: Bearer`."""

    issuer: str
    audiences: tuple[str, ...] = ()
    """One of them must be the token's; none: any."""
    jwks_file: Path | None = None
    jwks: str | None = None
    """What that file holds: public keys (RFC 7517)."""
    jwks_uri: str | None = None
    jwks_ca_file: Path | None = None
    """Of the server of jwks_uri; None: the host's."""
    claims_to_headers: tuple[tuple[str, str], ...] = ()
    """Claims, and the headers in which they are passed on."""
    forward: bool = False
    """Whether the token itself is passed on."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How many requests are let through; the others are answered with 429."""

    requests: int
    per: float
    """Seconds."""
    by_client: bool = True
    """Each client by itself (an IPv6 client is its /64), or all together."""


@dataclass(frozen=True, slots=True)
class Service:
    """What is done with the connections to one port, and for outbound listeners to some networks, by Envoy."""

    name: str
    port: int
    to: NetworkSet = NONE
    """Outbound: the destinations; none: all."""
    protocol: ServiceProtocol = ServiceProtocol.TCP
    upstream: Upstream = OriginalDestination()
    access: Access = EVERYBODY
    """As for the listener. With HTTP the client is the one that X-Forwarded-For names, where that is trusted."""
    trusted_ips: TrustedSources = TrustedSources()
    origin_verify: OriginVerify | None = None
    inject_headers: tuple[tuple[str, str], ...] = ()
    """Headers, and the secrets that are their values upstream."""
    jwt: Jwt | None = None
    rate_limit: RateLimit | None = None
    real_ip_header: str | None = None
    """The header in which the application gets the client's address."""
    ssl: ServerTls | None = None
    upstream_tls: ClientTls | None = None
    proxy_protocol: bool = False
    send_proxy_protocol: int | None = None
    """1 or 2."""
    http2: bool = False
    """Whether clients with TLS are offered HTTP/2, which the application then has to speak as well."""
    preserve_case: bool = False
    """Whether the names of headers keep the case that HTTP/1 clients and servers gave them."""


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
    services: tuple[Service, ...] = ()
    """What holds for one port instead of the above; only Envoy does that."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything. `tpctl.relay.settings.flags` and `tpctl.relay.settings.file` make it."""

    listeners: tuple[ListenerSettings, ...] = ()
    dns: DnsSettings = field(default_factory=DnsSettings)
    workers: int = 1
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    access_log: bool = False
    metrics: Address | None = None
    dns_metrics: Address | None = None
    """Of what answers DNS beside Envoy, whose figures `metrics` are then; the relay has one address for all of its."""
    limits: Limits = field(default_factory=Limits)
    """Over all listeners; only the total counts."""
    user: str | None = None
    accelerate: Acceleration = Acceleration.OFF
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    """By their names; only Envoy uses any."""

    @property
    def served(self) -> tuple[ListenerSettings, ...]:
        """The listeners, and that of the metrics."""
        if self.metrics is None:
            return self.listeners
        return (*self.listeners, ListenerSettings(METRICS, Role.METRICS, Listen(self.metrics)))
