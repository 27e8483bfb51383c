"""Where connections go: clusters, by the upstream of a listener or a service (CDS). Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from tpctl.envoy.documents import TYPE, Resource
from tpctl.envoy.secrets import Secrets, is_address
from tpctl.envoy.words import APART, duration, endpoints, extension, socket_address, typed
from tpctl.relay.settings.model import (
    ClientTls,
    FixedAddress,
    Jwt,
    ListenerSettings,
    Service,
    ServicePorts,
    ServiceProtocol,
    Source,
)
from tpctl.spec.policy import RESERVED, Family

_CLUSTER = f"{TYPE}config.cluster.v3.Cluster"
_NO_BREAKER = 10**6
"""Its default of 1024 connections is meant for one service; a cluster here may be all of a host's."""
_UPSTREAM_IDLE = "1s"
"""Less than any usual server waits for the next request: of two that end a connection at once, the client gets 503."""
PRESERVE_CASE = {
    "stateful_formatter": extension(
        "envoy.http.stateful_header_formatters.preserve_case",
        "http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig",
    )
}


@dataclass(slots=True)
class Clusters:
    """The clusters that have been referred to, by their names."""

    secrets: Secrets
    found: dict[str, Resource] = field(default_factory=dict)

    def of_listener(self, listener: ListenerSettings) -> str:
        """The cluster of the connections that no service takes."""
        return self._add(listener, listener, listener.name)

    def of_service(self, listener: ListenerSettings, service: Service) -> str:
        """The cluster of a service."""
        return self._add(listener, service, f"{listener.name}{APART}{service.name}")

    def of_keys(self, name: str, jwt: Jwt) -> str:
        """The cluster of the server of a token's keys."""
        assert jwt.jwks_uri is not None
        url = urlsplit(jwt.jwks_uri)
        assert url.hostname is not None
        name = f"{name}{APART}jwks"
        context = {"validation_context_sds_secret_config": self.secrets.server_authorities(
            f"{name}{APART}ca", jwt.jwks_ca_file, url.hostname)}  # fmt: skip
        self.found[name] = {
            "@type": _CLUSTER,
            "name": name,
            "type": "STATIC" if is_address(url.hostname) else "STRICT_DNS",
            "dns_lookup_family": "ALL",
            "connect_timeout": "5s",
            "load_assignment": endpoints(name, socket_address(url.hostname, url.port or 443)),
            "transport_socket": _tls_socket(url.hostname, context),
        }
        return name

    def of_admin(self, path: str) -> str:
        """The cluster of Envoy's own admin interface."""
        self.found["admin"] = {
            "@type": _CLUSTER,
            "name": "admin",
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": endpoints("admin", {"pipe": {"path": path}}),
        }
        return "admin"

    def _add(self, listener: ListenerSettings, what: ListenerSettings | Service, name: str) -> str:
        cluster: Resource = {"@type": _CLUSTER, "name": name, **_addresses(name, what)}
        cluster["connect_timeout"] = duration(listener.timeouts.connect or 3600)
        limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
        cluster["circuit_breakers"] = {"thresholds": [dict.fromkeys(limits, _NO_BREAKER)]}
        if listener.source is Source.PASSTHROUGH and self._is_here(what):
            first, second = ({"address": _passthrough(family), "port_value": 0} for family in RESERVED)
            cluster["upstream_bind_config"] = {
                "source_address": first,
                "extra_source_addresses": [{"address": second}],
            }
        if isinstance(what, Service) and what.protocol is not ServiceProtocol.TCP:
            cluster["typed_extension_protocol_options"] = _http_options(what)
        socket = self._transport(name, what.upstream_tls, what.send_proxy_protocol)
        if socket is not None:
            cluster["transport_socket"] = socket
        self.found[name] = cluster
        return name

    def _is_here(self, what: ListenerSettings | Service) -> bool:
        """Whether an upstream is on this host; another one could not answer 127.0.0.6.

        Dialled from an address of its own, this host would redirect the connection to Envoy again (rule o3).
        """
        host, _ = _dialled(what)
        return host is None or ip_address(host).is_loopback or host in self.secrets.places.here

    def _transport(self, name: str, tls: ClientTls | None, proxy_protocol: int | None) -> Resource | None:
        inner = None if tls is None else _tls_socket(tls.server_name, self._context(name, tls))
        if proxy_protocol is None:
            return inner
        config: dict[str, Any] = {"version": f"V{proxy_protocol}"}
        if proxy_protocol == 2:
            config["pass_through_tlvs"] = {"match_type": "INCLUDE_ALL"}
        return extension(
            "envoy.transport_sockets.upstream_proxy_protocol",
            "transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
            config=config,
            transport_socket=inner
            or extension("envoy.transport_sockets.raw_buffer", "transport_sockets.raw_buffer.v3.RawBuffer"),
        )

    def _context(self, name: str, tls: ClientTls) -> Resource:
        context: Resource = {}
        if tls.tls_verify:
            context["validation_context_sds_secret_config"] = self.secrets.server_authorities(
                f"{name}{APART}upstream_tls-ca", tls.ca_file, tls.server_name
            )
        if tls.certificate is not None:
            context["tls_certificate_sds_secret_configs"] = [
                self.secrets.certificate(f"{name}{APART}upstream_tls-certificate", tls)
            ]
        return context


def _addresses(name: str, what: ListenerSettings | Service) -> Resource:
    host, port = _dialled(what)
    if host is not None:
        assert port is not None
        return {"type": "STATIC", "load_assignment": endpoints(name, socket_address(host, port))}
    other = {} if port is None else {"original_dst_lb_config": {"upstream_port_override": port}}
    return {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "cleanup_interval": "60s", **other}


def _dialled(what: ListenerSettings | Service) -> tuple[str | None, int | None]:
    """The address and the port; None: those that the client called."""
    upstream = what.upstream
    if isinstance(upstream, FixedAddress):
        return upstream.destination.host, upstream.destination.port
    if isinstance(upstream, ServicePorts):
        assert isinstance(what, Service)
        host, port = upstream.of(what.port)
        return host, None if host is None and port == what.port else port
    return None, None


def _passthrough(family: Family) -> str:
    return str(RESERVED[family].passthrough.network_address)


def _tls_socket(server_name: str | None, context: Resource) -> Resource:
    # As for the relay: 1.2 and newer. Envoy's own maximum for upstreams is 1.2.
    versions = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}
    fields: Resource = {"common_tls_context": {"tls_params": versions, **context}}
    if server_name is not None and not is_address(server_name):
        fields["sni"] = server_name
    return extension("envoy.transport_sockets.tls", "transport_sockets.tls.v3.UpstreamTlsContext", **fields)


def _http_options(service: Service) -> Resource:
    """The upstream is spoken to in the client's version of HTTP."""
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http1 = {"header_key_format": PRESERVE_CASE} if service.preserve_case else {}
    options = typed(
        "upstreams.http.v3.HttpProtocolOptions",
        use_downstream_protocol_config={"http_protocol_options": http1, "http2_protocol_options": {}},
        common_http_protocol_options={"idle_timeout": _UPSTREAM_IDLE},
    )
    return {name: options}
