"""Envoy's configuration of the relay's settings. Pure: the same settings and places give the same bytes.

What is unsafe by default and is not here (each has a test that attacks it):

- A connection to a listener's own port is closed. Its original destination is the listener, which would dial itself
  until it has no descriptors left.
- The address in a PROXY protocol header is never dialled (`listeners`), and only trusted senders are heard.
- A port with TLS has it for everybody; no chain takes what is not TLS (`chains`).
- Access rules of TCP choose the chain, before the client has sent anything and the server can (`chains`).
- Listeners do not insist on their clusters (`http`), and clusters are written first (`documents`).
- What `--mode validate` does not look at is looked at before (`referenced`, and `documents.static`).
"""

from __future__ import annotations

from typing import Any

from tpctl.envoy.chains import Chains
from tpctl.envoy.clusters import Clusters
from tpctl.envoy.dataplane import expanded
from tpctl.envoy.documents import CLUSTERS, LISTENERS, Documents, Places, Resource
from tpctl.envoy.listeners import listeners, metrics_listener
from tpctl.envoy.secrets import Secrets
from tpctl.envoy.words import extension
from tpctl.relay.settings.model import ListenerSettings, OriginalDestination, Role, Settings

_ADMIN_MODE = 0o600
_FIELDS = {
    "time": "%START_TIME%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "peer": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "destination": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "upstream": "%UPSTREAM_HOST%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ)%",
    "status": "%RESPONSE_CODE%",
    "sent": "%BYTES_RECEIVED%",
    "received": "%BYTES_SENT%",
    "milliseconds": "%DURATION%",
    "reason": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "connection": "%CONNECTION_TERMINATION_DETAILS%",
    "error": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
"""Of a line of the access log. Without the query: it may hold what is nobody's business."""


def render(settings: Settings, places: Places) -> Documents:
    """The documents of settings that `tpctl.envoy.settings` has not refused, without listeners for DNS."""
    settings = expanded(settings)
    secrets = Secrets(places, dict(settings.secrets))
    clusters = Clusters(secrets)
    found = [
        one
        for listener in settings.listeners
        if listener.role is not Role.DNS
        for one in listeners(
            listener, Chains(listener, _own_ports(settings, listener), secrets, clusters, _log(settings))
        )
    ]
    if settings.metrics is not None:
        found.append(metrics_listener(settings.metrics, clusters.of_admin(str(places.admin))))
    return Documents(_bootstrap(settings, places), found, list(clusters.found.values()), list(secrets.found.values()))


def _own_ports(settings: Settings, listener: ListenerSettings) -> frozenset[int]:
    """Where a listener may not be called.

    What comes in is for this host, so it is for none of its ports; what goes out may be for another host's.
    """
    listeners_ = settings.listeners if listener.role is Role.INBOUND else (listener,)
    ports = {one.listen.port for one in listeners_ if isinstance(one.upstream, OriginalDestination)}
    return frozenset(port for port in ports if port is not None)


def _log(settings: Settings) -> Any:
    def loggers(name: str) -> list[Resource]:
        if not settings.access_log:
            return []
        kind = "access_loggers.stream.v3.StderrAccessLog"
        form = {"json_format": {"service": name, **_FIELDS}}
        return [extension("envoy.access_loggers.stderr", kind, log_format=form)]

    return loggers


def _bootstrap(settings: Settings, places: Places) -> Resource:
    most = min(settings.limits.connections or places.connections, places.connections)
    limit = extension(
        "envoy.resource_monitors.global_downstream_max_connections",
        "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        max_active_downstream_connections=most,
    )
    bootstrap = {
        "node": {"id": "tpctl", "cluster": "tpctl"},
        "admin": {
            "address": {"pipe": {"path": str(places.admin), "mode": _ADMIN_MODE}},
            "ignore_global_conn_limit": True,
        },
        "dynamic_resources": {"cds_config": places.watched(CLUSTERS), "lds_config": places.watched(LISTENERS)},
        "overload_manager": {"resource_monitors": [limit]},
    }
    limits = {
        f"envoy.resource_limits.listener.{listener.name}.connection_limit": listener.limits.connections
        for listener in settings.listeners
        if listener.limits.connections
    }
    if limits:
        bootstrap["layered_runtime"] = {"layers": [{"name": "limits", "static_layer": limits}]}
    return bootstrap
