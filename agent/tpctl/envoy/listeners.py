"""The listeners (LDS): sockets, listener filters, and who takes what. Pure."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from tpctl.envoy.chains import Chains
from tpctl.envoy.documents import TYPE, Resource
from tpctl.envoy.words import APART, address_of, duration, extension, socket_address
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import Address, Listen
from tpctl.relay.settings.model import ListenerSettings, Role, ServiceProtocol, Source

_LISTENER = f"{TYPE}config.listener.v3.Listener"
_INSPECTION = "0.5s"
"""How long `detect` waits for the client's first bytes. A server that speaks first is silent for as long."""
_BUFFER = 64 * 1024
"""Bytes each way that are kept for somebody who does not read. Envoy's default, 1 MiB, is much for many connections."""


def listeners(settings: ListenerSettings, chains: Chains) -> Iterator[Resource]:
    """A listener, and one without a socket of its own for each port with PROXY protocol headers."""
    services = settings.services
    headers = [service for service in services if service.proxy_protocol]
    found: Resource = {
        "@type": _LISTENER,
        "name": settings.name,
        "traffic_direction": settings.role.name,
        **_sockets(settings.listen),
        **_socket_options(settings),
        "per_connection_buffer_limit_bytes": _BUFFER,
        "listener_filters": list(_filters(settings)),
        "filter_chains": chains.by_port(),
        "default_filter_chain": chains.default(),
    }
    if any(service.protocol is ServiceProtocol.DETECT for service in services):
        found["listener_filters_timeout"] = _INSPECTION
        found["continue_on_listener_filters_timeout"] = True
    if headers:
        # The original destination chooses another listener, as below, if there is one for it.
        found["use_original_dst"] = True
    yield found
    for service in headers:
        yield _behind_header(settings, service.port, chains.after_header(service))


def _behind_header(settings: ListenerSettings, port: int, chains: list[Resource]) -> Resource:
    """The listener of a port whose clients send PROXY protocol headers.

    A header replaces the local address, which would then be dialled: an untrusted client could reach any address from
    here. So the address that was called is kept before the header is read, and that one is dialled.
    """
    kept = {
        "object_key": "envoy.network.transport_socket.original_dst_address",
        "format_string": {"text_format_source": {"inline_string": "%DOWNSTREAM_LOCAL_ADDRESS%"}},
    }
    name = "envoy.filters.listener.set_filter_state"
    keep = extension(name, "filters.listener.set_filter_state.v3.Config", on_accept=[kept])
    kind = "filters.listener.proxy_protocol.v3.ProxyProtocol"
    tlvs = {"match_type": "INCLUDE_ALL"}
    filters = [keep, extension("envoy.filters.listener.proxy_protocol", kind, pass_through_tlvs=tlvs)]
    if settings.source is Source.CLIENT:
        filters.append(_original_source())
    return {
        "@type": _LISTENER,
        "name": f"{settings.name}{APART}{port}",
        "traffic_direction": settings.role.name,
        "bind_to_port": False,
        "address": socket_address("0.0.0.0", port),
        "additional_addresses": [{"address": socket_address("::", port)}],
        "per_connection_buffer_limit_bytes": _BUFFER,
        "listener_filters": filters,
        "listener_filters_timeout": duration(settings.timeouts.handshake),
        "filter_chains": chains,
    }


def _sockets(listen: Listen) -> Resource:
    """The address. One for both families is two sockets: then nobody has an IPv4 address that is written as IPv6."""
    assert isinstance(listen.address, Destination)
    if listen.address.family == socket.AF_INET6 and listen.is_wildcard and not listen.ipv6only:
        other = {"address": address_of(listen.address)}
        return {"address": socket_address("0.0.0.0", listen.address.port), "additional_addresses": [other]}
    return {"address": address_of(listen.address)}


def _socket_options(settings: ListenerSettings) -> Resource:
    """What the words of `listen` say about the socket."""
    listen, options = settings.listen, []
    keepalive = listen.keepalive
    if keepalive is not None:
        options.append(_option("so_keepalive", socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(keepalive.on)))
        values = (keepalive.idle, keepalive.interval, keepalive.count)
        numbers = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        for number, value in zip(numbers, values, strict=True):
            if value is not None:
                options.append(_option("so_keepalive", socket.IPPROTO_TCP, number, value))
    if listen.deferred:
        seconds = int(settings.timeouts.handshake) or 1
        options.append(_option("deferred", socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, seconds))
    found: Resource = {"tcp_backlog_size": listen.backlog}
    if listen.transparent:
        found["transparent"] = True
    return {**found, "socket_options": options} if options else found


def _option(word: str, level: int, number: int, value: int) -> Resource:
    return {"description": word, "level": level, "name": number, "int_value": value, "state": "STATE_PREBIND"}


def _filters(settings: ListenerSettings) -> Iterator[Resource]:
    yield extension("envoy.filters.listener.original_dst", "filters.listener.original_dst.v3.OriginalDst")
    if settings.source is Source.CLIENT:
        yield _original_source()
    detected = {service.port for service in settings.services if service.protocol is ServiceProtocol.DETECT}
    if detected:
        kind = "filters.listener.http_inspector.v3.HttpInspector"
        inspector = extension("envoy.filters.listener.http_inspector", kind)
        yield {**inspector, "filter_disabled": {"not_match": _any_of(sorted(detected))}}


def _original_source() -> Resource:
    return extension("envoy.filters.listener.original_src", "filters.listener.original_src.v3.OriginalSrc")


def _any_of(ports: list[int]) -> Resource:
    rules: list[Any] = [{"destination_port_range": {"start": port, "end": port + 1}} for port in ports]
    return rules[0] if len(rules) == 1 else {"or_match": {"rules": rules}}


def metrics_listener(address: Address, admin: str) -> Resource:
    """A listener for /metrics and /ready; nothing else of the admin interface can be reached through it."""
    get = {"name": ":method", "string_match": {"exact": "GET"}}
    paths = {"/metrics": "/stats/prometheus?usedonly", "/ready": "/ready"}
    routes = [
        {"match": {"path": path, "headers": [get]}, "route": {"cluster": admin, "prefix_rewrite": target}}
        for path, target in paths.items()
    ]
    manager = extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="metrics",
        http_filters=[extension("envoy.filters.http.router", "filters.http.router.v3.Router")],
        route_config={
            "name": "metrics",
            "validate_clusters": False,
            "virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": routes}],
        },
    )
    where = address_of(address) if isinstance(address, Destination) else {"pipe": {"path": str(address), "mode": 0o660}}
    return {
        "@type": _LISTENER,
        "name": Role.METRICS.value,
        "address": where,
        "ignore_global_conn_limit": True,
        "filter_chains": [{"name": "metrics", "filters": [manager]}],
    }
