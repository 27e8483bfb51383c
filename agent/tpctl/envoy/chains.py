"""Which connection meets what: the filter chains of a listener. Pure.

Envoy chooses a chain by the port that was called, then by the most specific network of the destination, the protocol
it has recognised, and the networks of the sender and of the source; it never goes back. Once there is a chain for a
port, no chain without a port is asked for it: what matches none of the port's chains meets the default chain. So the
chains of each port are complete in themselves here, and end with one that takes whatever is left.

Access rules of TCP are matches too: a filter would be asked only when the client has sent its first byte, and by then a
server that speaks first has sent its banner to somebody who is denied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_network

from tpctl.envoy.clusters import Clusters
from tpctl.envoy.documents import Resource
from tpctl.envoy.http import Requests
from tpctl.envoy.secrets import Secrets
from tpctl.envoy.words import APART, cidrs, clients, duration, extension
from tpctl.relay.loop.networks import NetworkSet
from tpctl.relay.settings.access import METADATA, NAT64, Access
from tpctl.relay.settings.model import ListenerSettings, Role, ServerTls, Service, ServiceProtocol
from tpctl.relay.settings.partition import admitted, minus, shared
from tpctl.spec.policy import Network

REFUSED = extension("refused", "filters.network.direct_response.v3.Config")
"""Sends nothing and closes."""
_HTTP = ["http/1.0", "http/1.1", "h2c"]
"""What the HTTP inspector recognises."""
_METADATA = NetworkSet([
    *METADATA.networks,
    *(ip_network((IPv6Address(NAT64 + one.network_address.packed), 128))
      for one in METADATA.networks if one.version == 4),
])  # fmt: skip
_LINK_LOCAL = (ip_network("fe80::/10"),)
"""Addresses with a scope, with which Envoy cannot write a PROXY protocol header: one of version 2 ends it (1.40)."""
_FROM_LINK_LOCAL = {"source_prefix_ranges": cidrs(_LINK_LOCAL)}


@dataclass(frozen=True, slots=True)
class Chains:
    """The filter chains of one listener."""

    listener: ListenerSettings
    own_ports: frozenset[int]
    """Ports of listeners that dial the original destination: whoever calls one of them would make Envoy dial itself."""
    secrets: Secrets
    clusters: Clusters
    log: Callable[[str], list[Resource]]
    """The access loggers of what has a name."""

    def by_port(self) -> list[Resource]:
        """The chains with a match."""
        return [*self._guards(), *self._services(), *self._rest(None)[:-1]]

    def default(self) -> Resource:
        """The chain of what matches no other."""
        last = dict(self._rest(None)[-1])
        last.pop("filter_chain_match", None)
        return last

    def after_header(self, service: Service) -> list[Resource]:
        """The chains of a service's own listener, behind a PROXY protocol header; whoever matches none is closed.

        They ask for the sender's address, which the header has not replaced.
        """
        senders = {"direct_source_prefix_ranges": cidrs(service.trusted_ips.networks.networks)}
        return list(self._inbound(service, senders))

    def _guards(self) -> Iterator[Resource]:
        for port in sorted(self.own_ports):
            yield _chain(f"own-port-{port}", {"destination_port": port}, [REFUSED])

    def _services(self) -> Iterator[Resource]:
        for port in sorted({service.port for service in self.listener.services}):
            services = [service for service in self.listener.services if service.port == port]
            if self.listener.role is Role.INBOUND:
                yield from (
                    chain
                    for service in services
                    if not service.proxy_protocol
                    for chain in self._inbound(service, {"destination_port": port})
                )
            else:
                yield from self._outbound(port, services)

    def _inbound(self, service: Service, match: Resource) -> Iterator[Resource]:
        """By the source. The client that X-Forwarded-For names is a filter's affair."""
        name, tls = self._name(service), self._tls(self._name(service), service.ssl, http2=service.http2)
        access, forwarders = service.access, service.trusted_ips.forwarders.networks
        if service.send_proxy_protocol is not None:
            access, forwarders = _and_denied(access, _LINK_LOCAL), minus(forwarders, _LINK_LOCAL)
            yield _refused_to(name, match)
        if service.protocol is not ServiceProtocol.TCP:
            http = {**match, "application_protocols": _HTTP} if _is_detected(service) else match
            if service.send_proxy_protocol is not None:
                yield _refused_from(name, http)
            if forwarders:
                trusted = {**http, "source_prefix_ranges": clients(forwarders)}
                yield _chain(f"{name}{APART}forwarded", trusted, [self._requests(service, forwarded=True)], tls)
            yield _chain(f"{name}{APART}http", http, [self._requests(service, forwarded=False)], tls)
            if not _is_detected(service):
                return
        yield from _by_source(name, match, access, self._stream(name, self._cluster(service)), tls)

    def _outbound(self, port: int, services: Sequence[Service]) -> Iterator[Resource]:
        """By the destination: the most specific `to` wins, and the listener's own rules hold where there is none."""
        for service in services:
            others = [one for other in services if other is not service for one in other.to.networks]
            # Network by network: a part of one may be another's, and a part of that this service's again.
            territory = minus([left for own in service.to.networks for left in minus([own], _inside(own, others))], ())
            match = {"destination_port": port}
            access = self._destinations(service.access, service)
            yield from self._to(self._name(service), match, territory, access, self._handlings(service))
        named = [one for service in services for one in service.to.networks]
        general = next((service for service in services if not service.to), None)
        match = {"destination_port": port}
        if general is None:
            yield from self._rest(port, named)
        else:
            access = self._destinations(general.access, general)
            yield from self._to_rest(self._name(general), match, named, access, self._handlings(general))

    def _rest(self, port: int | None, named: Sequence[Network] = ()) -> list[Resource]:
        """What no service takes; the last one takes whatever is left."""
        listener = self.listener
        name = listener.name if port is None else f"{listener.name}{APART}{port}"
        match = {} if port is None else {"destination_port": port}
        stream = self._stream(listener.name, self.clusters.of_listener(listener))
        if listener.role is Role.INBOUND:
            tls, access, refused = self._tls(listener.name, listener.ssl), listener.access, []
            if listener.send_proxy_protocol is not None:
                access, refused = _and_denied(access, _LINK_LOCAL), [_refused_to(name, match)]
            return [*refused, *_by_source(name, match, access, stream, tls)]
        access = self._destinations(listener.access, listener)
        return list(self._to_rest(name, match, named, access, self._apart(listener, [({}, stream)])))

    def _to(
        self, name: str, match: Resource, territory: Sequence[Network], access: Access, handlings: _Handlings
    ) -> Iterator[Resource]:
        """Chains for some destinations."""
        good = shared(territory, admitted(access))
        bad = minus(territory, good)
        if good:
            yield from _handled(name, {**match, "prefix_ranges": cidrs(good)}, handlings)
        if bad:
            yield _chain(f"{name}{APART}refused", {**match, "prefix_ranges": cidrs(bad)}, [REFUSED])

    def _to_rest(
        self, name: str, match: Resource, named: Sequence[Network], access: Access, handlings: _Handlings
    ) -> Iterator[Resource]:
        """Chains for all destinations but those that are named elsewhere; the last one has no network."""
        if access.default_allow:
            bad = minus(access.deny.networks, named)
            if bad:
                yield _chain(f"{name}{APART}refused", {**match, "prefix_ranges": cidrs(bad)}, [REFUSED])
            yield from _handled(name, match, handlings)
            return
        good = minus(admitted(access), named)
        if good:
            yield from _handled(name, {**match, "prefix_ranges": cidrs(good)}, handlings)
        yield _chain(f"{name}{APART}refused", match, [REFUSED])

    def _destinations(self, access: Access, what: ListenerSettings | Service) -> Access:
        """Access rules with all that is not dialled among the denied ones."""
        if not self.listener.allow_metadata_addresses:
            access = _and_denied(access, _METADATA.networks)
        return access if what.send_proxy_protocol is None else _and_denied(access, _LINK_LOCAL)

    def _apart(self, what: ListenerSettings | Service, handlings: _Handlings) -> _Handlings:
        """The same, and those who cannot be named in a PROXY protocol header refused, if one is to be sent."""
        if what.send_proxy_protocol is None:
            return handlings
        refused = [({**more, **_FROM_LINK_LOCAL}, [REFUSED]) for more, _ in handlings]
        return [*refused, *handlings]

    def _handlings(self, service: Service) -> _Handlings:
        """The filters of an outbound service, and what more has to match."""
        if service.protocol is ServiceProtocol.TCP:
            return self._apart(service, [({}, self._stream(self._name(service), self._cluster(service)))])
        requests = [self._requests(service, forwarded=False)]
        if not _is_detected(service):
            return self._apart(service, [({}, requests)])
        stream = self._stream(self._name(service), self._cluster(service))
        return self._apart(service, [({"application_protocols": _HTTP}, requests), ({}, stream)])

    def _name(self, service: Service) -> str:
        return f"{self.listener.name}{APART}{service.name}"

    def _cluster(self, service: Service) -> str:
        """Its own, unless it is dialled exactly as the listener's connections are."""
        listener = self.listener
        own = (service.upstream, service.upstream_tls, service.send_proxy_protocol)
        general = (listener.upstream, listener.upstream_tls, listener.send_proxy_protocol)
        if service.protocol is ServiceProtocol.TCP and own == general:
            return self.clusters.of_listener(listener)
        return self.clusters.of_service(listener, service)

    def _requests(self, service: Service, *, forwarded: bool) -> Resource:
        name, cluster = self._name(service), self._cluster(service)
        requests = Requests(self.listener, service, cluster, self.secrets, self.clusters, self.log(name))
        return requests.manager(forwarded=forwarded)

    def _stream(self, name: str, cluster: str) -> list[Resource]:
        idle = duration(self.listener.timeouts.idle)
        kind = "filters.network.tcp_proxy.v3.TcpProxy"
        proxy = extension(
            "envoy.filters.network.tcp_proxy",
            kind,
            stat_prefix=name,
            cluster=cluster,
            idle_timeout=idle,
            access_log=self.log(name),
        )
        return [proxy]

    def _tls(self, name: str, tls: ServerTls | None, *, http2: bool = False) -> _Tls | None:
        """TLS of clients. A port that has it has it for everybody: nothing asks first whether the client speaks it."""
        if tls is None:
            return None
        context: Resource = {
            "tls_certificate_sds_secret_configs": [self.secrets.certificate(f"{name}{APART}ssl-certificate", tls)],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": [*(["h2"] if http2 else []), "http/1.1"],
        }
        verified = tls.client_ca_file is not None and tls.verify_client != "off"
        if verified:
            context["validation_context_sds_secret_config"] = self.secrets.client_authorities(
                f"{name}{APART}ssl-client_ca", tls
            )
        socket = extension(
            "envoy.transport_sockets.tls",
            "transport_sockets.tls.v3.DownstreamTlsContext",
            common_tls_context=context,
            require_client_certificate=verified and tls.verify_client == "on",
        )
        timeout = duration(self.listener.timeouts.handshake)
        return {"transport_socket": socket, "transport_socket_connect_timeout": timeout}


_Tls = Resource
"""The fields of a chain whose clients speak TLS."""
_Handlings = Sequence[tuple[Resource, list[Resource]]]
"""More to match, and the filters."""


def _is_detected(service: Service) -> bool:
    return service.protocol is ServiceProtocol.DETECT


def _inside(network: Network, others: Iterable[Network]) -> list[Network]:
    """Those of the others that are a part of a network."""
    return [one for one in others if one.version == network.version and one.subnet_of(network)]  # type: ignore[arg-type]


def _handled(name: str, match: Resource, handlings: _Handlings) -> Iterator[Resource]:
    for more, filters in handlings:
        part = f"{name}{APART}http" if "application_protocols" in more else name
        yield _chain(f"{part}{APART}link-local" if filters == [REFUSED] else part, {**match, **more}, filters)


def _refused_to(name: str, match: Resource) -> Resource:
    return _chain(f"{name}{APART}to-link-local", {**match, "prefix_ranges": cidrs(_LINK_LOCAL)}, [REFUSED])


def _refused_from(name: str, match: Resource) -> Resource:
    return _chain(f"{name}{APART}http{APART}link-local", {**match, **_FROM_LINK_LOCAL}, [REFUSED])


def _and_denied(access: Access, networks: Iterable[Network]) -> Access:
    return Access(access.allow, NetworkSet([*access.deny.networks, *networks]), access.default_allow)


def _by_source(
    name: str, match: Resource, access: Access, filters: list[Resource], tls: _Tls | None
) -> Iterator[Resource]:
    """Chains for the sources that access rules admit, and for the others; the last one has no source."""
    refused = f"{name}{APART}refused"
    if access.default_allow:
        if access.deny:
            yield _chain(refused, {**match, "source_prefix_ranges": clients(access.deny.networks)}, [REFUSED])
        yield _chain(name, match, filters, tls)
        return
    good = admitted(access)
    if good:
        yield _chain(name, {**match, "source_prefix_ranges": clients(good)}, filters, tls)
    yield _chain(refused, match, [REFUSED])


def _chain(name: str, match: Resource, filters: list[Resource], tls: _Tls | None = None) -> Resource:
    chain: Resource = {"name": name, "filter_chain_match": match, "filters": filters}
    return {**chain, **(tls or {})}
