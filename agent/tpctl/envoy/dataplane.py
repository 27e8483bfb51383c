"""A listener with `upstream: dataplane`, in the words of services: one for each inbound of a Kuma Dataplane. Pure."""

from __future__ import annotations

from dataclasses import replace

from tpctl.relay.settings.model import ListenerSettings, OriginalDestination, Service, ServicePorts, Settings

_NAMED = "dataplane+"
"""How the names of these services begin: no name in the settings has a plus sign."""


def expanded(settings: Settings) -> Settings:
    """The same settings; the services that are added have the listener's own rules, and whatever has none is tcp."""
    return replace(settings, listeners=tuple(map(_expanded, settings.listeners)))


def _expanded(listener: ListenerSettings) -> ListenerSettings:
    upstream = listener.upstream
    if not isinstance(upstream, ServicePorts):
        return listener
    general = {service.port for service in listener.services if not service.to}
    added = tuple(
        Service(
            f"{_NAMED}{port}",
            port,
            upstream=upstream,
            access=listener.access,
            trusted_ips=listener.trusted_ips,
            ssl=listener.ssl,
            upstream_tls=listener.upstream_tls,
            send_proxy_protocol=listener.send_proxy_protocol,
        )
        for port in sorted(upstream.services.keys() - general)
    )
    return replace(listener, upstream=OriginalDestination(), services=(*listener.services, *added))
