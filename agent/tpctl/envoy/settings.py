"""The relay's file as Envoy takes it: what only the relay can do is refused, and what may surprise is said.

Listeners for DNS are served by the relay itself, beside Envoy: `of_dns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import PurePosixPath

from tpctl.envoy.dataplane import expanded
from tpctl.relay.settings import file
from tpctl.relay.settings.dns import DnsSettings
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import (
    Acceleration,
    ClientTls,
    FixedAddress,
    ListenerSettings,
    OriginalDestination,
    Role,
    Service,
    ServiceProtocol,
    Settings,
    Source,
)

_DNS_SECONDS = 5.0
"""The longest time that queries may take to be answered in the end; Envoy's connections have had theirs before."""
_RELAY = "only `tpctl relay` does that"


def load(path: str) -> Settings:
    """The settings of a file that Envoy shall serve. Raises InputError with every problem."""
    return file.load(path, refusals)


def settings_of(tree: object, path: str) -> Settings:
    """The settings that a parsed file stands for. Raises InputError with every problem."""
    return file.settings_of(tree, path, refusals)


def of_dns(settings: Settings) -> Settings:
    """What the relay answers beside Envoy: the listeners for DNS, if there are any, in one process."""
    listeners = tuple(listener for listener in settings.listeners if listener.role is Role.DNS)
    if not listeners:
        return Settings()
    drain_seconds = min(settings.drain_seconds, _DNS_SECONDS)
    return Settings(listeners, settings.dns, drain_seconds=drain_seconds, metrics=settings.dns_metrics)


def refusals(settings: Settings) -> Iterator[str]:
    """What Envoy cannot do, a line for each."""
    roles = {listener.role for listener in settings.listeners}
    if roles == {Role.DNS}:
        yield "listeners: all of them are for DNS, so there is nothing for Envoy; `tpctl relay --config` serves them"
    elif Role.DNS not in roles and (settings.dns != DnsSettings() or settings.dns_metrics):
        yield "dns: has no effect without a listener for DNS, as in {listen: '*:15053', direction: dns}"
    if settings.accelerate is not Acceleration.OFF:
        yield f"accelerate: {_RELAY}; leave it out"
    dialled = expanded(settings)
    for listener in dialled.listeners:
        for problem in _of_listener(listener):
            yield f"listener {listener.name}: {problem}"
        for service in listener.services:
            for problem in _of_service(service, _dialled_ports(dialled, listener)):
                yield f"listener {listener.name}: service {service.name}: {problem}"


def warnings(settings: Settings) -> Iterator[str]:
    """What works, and may not be what was meant."""
    for listener in settings.listeners:
        for service in listener.services:
            if service.protocol is ServiceProtocol.DETECT:
                yield (
                    f"listener {listener.name}: service {service.name}: protocol: with detect, a server that speaks "
                    "first (SMTP, MySQL, SSH) is silent for half a second; write tcp for its port"
                )


def _of_listener(listener: ListenerSettings) -> Iterator[str]:
    if listener.role is Role.DNS:
        return
    listen = listener.listen
    if isinstance(listen.address, PurePosixPath):
        yield f"listen: a unix socket: {_RELAY}"
    if listen.proxy_protocol:
        yield f"listen: proxy_protocol for every port: {_RELAY}; write proxy_protocol: true at each service"
    if listener.limits.connections_per_source:
        yield f"limits.connections_per_source: {_RELAY}; limits.connections is for all sources together"
    if listener.limits.connections and any(service.proxy_protocol for service in listener.services):
        yield (
            "limits.connections: Envoy does not count the connections of services with proxy_protocol; leave it out; "
            "limits.connections at the top is for all listeners"
        )
    if listener.timeouts.half_closed is not None:
        yield f"timeouts.half_closed: {_RELAY}; leave it out"
    if listener.source is Source.CLIENT and not (listen.transparent and listener.role is Role.INBOUND):
        yield "source: client needs an inbound listener with transparent in listen"
    if listener.trusted_ips.unix:
        yield f"trusted_ips: unix: {_RELAY}"
    if listener.upstream_tls is not None:
        yield from _of_upstream_tls(listener.upstream_tls, listener)


def _of_service(service: Service, dialled: frozenset[int | None]) -> Iterator[str]:
    if service.port in dialled:
        yield f"port: {service.port} is a listener's own, to which nobody may connect"
    upstream = service.upstream
    own = upstream.destination if isinstance(upstream, FixedAddress) else None
    if own is not None and own.port in dialled and ip_address(own.host).is_loopback:
        yield f"upstream: {show(own)} is a listener's own, which would dial itself"
    if service.trusted_ips.unix:
        yield f"trusted_ips: unix: {_RELAY}"
    limit = service.rate_limit
    if limit is not None and not limit.by_client and service.trusted_ips.forwarders:
        yield (
            "rate_limit.by: service: clients behind trusted proxies and others would be counted apart; "
            "give this service trusted_ips: [], or write by: client"
        )
    if service.upstream_tls is not None:
        yield from _of_upstream_tls(service.upstream_tls, service)


def _of_upstream_tls(tls: ClientTls, what: ListenerSettings | Service) -> Iterator[str]:
    if tls.tls_verify_depth is not None:
        yield (
            f"upstream_tls.tls_verify_depth: Envoy does not enforce it towards upstreams, and {_RELAY}; leave it out, "
            "or let a ca_file name only the authority that signs the upstream's certificate"
        )
    if tls.tls_verify and tls.server_name is None and not isinstance(what.upstream, FixedAddress):
        yield (
            "upstream_tls.server_name: is missing; to look for the address of each upstream in its certificate: "
            f"{_RELAY}"
        )


def _dialled_ports(settings: Settings, listener: ListenerSettings) -> frozenset[int | None]:
    """See `tpctl.envoy.render`: where a listener would make Envoy dial itself."""
    own = settings.listeners if listener.role is Role.INBOUND else (listener,)
    return frozenset(one.listen.port for one in own if isinstance(one.upstream, OriginalDestination))
