"""What makes no sense together in the relay's settings, wherever they came from. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import PurePosixPath

from tpctl.relay.settings.listen import Listen, show
from tpctl.relay.settings.model import (
    METRICS,
    FixedAddress,
    ListenerSettings,
    OriginalDestination,
    Role,
    Settings,
    Source,
)

MAX_LISTENERS = 64
_ENVOY = "`tpctl envoy` serves such a file"


def contradictions(settings: Settings) -> Iterator[str]:
    """A line for each, beginning with the listener it is about."""
    listeners = settings.listeners
    if len(listeners) > MAX_LISTENERS:
        yield f"listeners: there are {len(listeners)}, and at most {MAX_LISTENERS} are possible"
    names = [listener.name for listener in listeners]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"listeners: {names.count(name)} of them are called {name}; give each a name of its own"
    for first, second in itertools.combinations(listeners, 2):
        yield from _overlap(first, second)
    for listener in listeners:
        for problem in (*_of_dns(listener), *_of_any(listener)):
            yield f"listener {listener.name}: {problem}"
    yield from _of_metrics(settings)
    if settings.limits.connections_per_source:
        yield "limits.connections_per_source: belongs to a listener; over all of them only connections can be limited"


def _of_metrics(settings: Settings) -> Iterator[str]:
    given = [(key, at) for key, at in (("metrics", settings.metrics), ("dns.metrics", settings.dns_metrics)) if at]
    if given and METRICS in {listener.name for listener in settings.listeners}:
        yield f"listeners: one of them is called {METRICS}, which is the name of the metrics; choose another name"
    for key, at in given:
        for listener in settings.listeners:
            if listener.listen.overlaps(Listen(at)):
                yield f"{key}: {show(at)} is also where listener {listener.name} listens"
    if len(given) == 2 and Listen(given[0][1]).overlaps(Listen(given[1][1])):
        yield f"dns.metrics: {show(given[1][1])} is also where metrics are; give each an address of its own"


def only_envoy(settings: Settings) -> Iterator[str]:
    """What the relay cannot do, a line for each."""
    if settings.secrets:
        yield f"secrets: nothing of the relay's uses any; {_ENVOY}"
    if settings.dns_metrics is not None:
        yield "dns.metrics: the relay serves the figures of DNS with all others; write metrics, at the top"
    for listener in settings.listeners:
        if listener.services:
            yield f"listener {listener.name}: services: the relay passes connections on as they are; {_ENVOY}"
        if listener.trusted_ips.x_forwarded_for is not None:
            yield f"listener {listener.name}: trusted_ips.x_forwarded_for: the relay reads no HTTP; {_ENVOY}"


def _overlap(first: ListenerSettings, second: ListenerSettings) -> Iterator[str]:
    if not first.listen.overlaps(second.listen):
        return
    same = first.listen.address == second.listen.address
    if same or not (first.listen.reuseport and second.listen.reuseport):
        hint = "give each a port of its own" if same else "give both reuseport, or each a port of its own"
        yield (
            f"listeners {first.name} and {second.name}: {show(first.listen.address)} and "
            f"{show(second.listen.address)} overlap; {hint}"
        )


def _of_dns(listener: ListenerSettings) -> Iterator[str]:
    if listener.role is not Role.DNS:
        return
    if not isinstance(listener.upstream, OriginalDestination):
        yield "upstream: DNS goes to the name servers of dns.resolv_conf; leave it out"
    for name in ("transparent", "proxy_protocol", "ssl", "deferred"):
        if getattr(listener.listen, name):
            yield f"listen: {name} is not possible for DNS"
    if isinstance(listener.listen.address, PurePosixPath):
        yield "listen: DNS cannot be served on a unix socket"
    for name in ("send_proxy_protocol", "upstream_tls"):
        if getattr(listener, name) is not None:
            yield f"{name}: is not possible for DNS"


def _of_any(listener: ListenerSettings) -> Iterator[str]:
    listen = listener.listen
    if listen.ssl and listener.ssl is None:
        yield "listen: ssl needs a section ssl with certificate and certificate_key"
    if listener.ssl is not None and not listen.ssl:
        yield "ssl: has no effect without the option ssl in listen"
    if listen.proxy_protocol and not listener.trusted_ips:
        yield "listen: proxy_protocol needs trusted_ips, the networks whose headers are trusted"
    if isinstance(listen.address, PurePosixPath):
        if not listen.proxy_protocol and not isinstance(listener.upstream, FixedAddress):
            yield "listen: a unix socket has no original destination; add proxy_protocol, or name an upstream"
        if listen.proxy_protocol and not listener.trusted_ips.unix:
            yield "trusted_ips: unix: is missing, so nothing could use this unix socket"
        if listener.limits.connections_per_source and not listen.proxy_protocol:
            yield "limits.connections_per_source: the clients of a unix socket have no address"
    if listener.source is Source.PASSTHROUGH and listener.role is not Role.INBOUND:
        yield f"source: passthrough is for inbound listeners; {listener.role} ones dial from any address: kernel"
