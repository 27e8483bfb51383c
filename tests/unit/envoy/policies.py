"""Random files for Envoy, what each says should happen to a connection, and which filter chain Envoy takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tpctl.envoy.documents import Documents, Resource
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.access import Access, is_metadata
from tpctl.relay.settings.model import ListenerSettings, Role, Service, ServicePorts, ServiceProtocol, Settings

PORTS = (25, 80, 443, 8080)
"""Few, so that services meet on one."""
OTHER_PORT = 9999
NETWORKS = ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "169.254.0.0/16", "169.254.169.254/32",
            "203.0.113.0/24", "fd00::/8", "fd00:1::/32", "fd00:1::1/128", "fd00:ec2::254/128", "64:ff9b::/96",
            "fe80::/10", "fe80::/64", "0.0.0.0/0", "::/0")  # fmt: skip
"""Nested, and some with metadata services in them."""
ADDRESSES = ("10.0.0.1", "10.1.0.1", "10.1.2.1", "10.1.2.3", "10.1.3.0", "169.254.0.1", "169.254.169.254",
             "203.0.113.7", "192.0.2.1", "fd00::1", "fd00:1::1", "fd00:1::2", "fd00:ec2::254", "64:ff9b::a9fe:a9fe",
             "64:ff9b::1", "2001:db8::1", "fe80::1")  # fmt: skip
REFUSED = "refused"


def _some(most: int = 4, least: int = 0) -> st.SearchStrategy[list[str]]:
    return st.sets(st.sampled_from(NETWORKS), min_size=least, max_size=most).map(sorted)


ACCESS = st.fixed_dictionaries(
    {}, optional={"allow": _some(), "deny": _some(), "default": st.sampled_from(["allow", "deny"])}
)
TRUSTED = _some(2) | st.fixed_dictionaries({"proxy_protocol": _some(2), "x_forwarded_for": _some(2)})


@st.composite
def services(draw: st.DrawFn, there: Path, role: str) -> dict[str, Any]:
    """A service; not every one can be told from the others of its listener, or makes sense."""
    protocol = draw(st.sampled_from(["http", "http", "tcp", "detect"]))
    port = draw(st.sampled_from(PORTS))
    found: dict[str, Any] = {"port": port, "protocol": protocol, "name": f"s{draw(st.integers(0, 10**9))}"}
    more: dict[str, st.SearchStrategy[Any]] = {
        "access": ACCESS,
        "upstream": st.just("127.0.0.1:1") | st.just("[::1]:1"),
        "send_proxy_protocol": st.sampled_from(["v1", "v2"]),
        "upstream_tls": st.sampled_from([
            {"server_name": "a.test", "ca_file": f"{there}/root.pem"},
            {"tls_verify": False, "certificate": f"{there}/client.pem", "certificate_key": f"{there}/client.key"},
        ]),
    }  # fmt: skip
    if role == "outbound":
        more["to"] = _some(2, 1)
    else:
        more["trusted_ips"] = TRUSTED
    server = {"certificate": f"{there}/server.pem", "certificate_key": f"{there}/server.key"}
    if role == "inbound" and protocol != "detect":
        more["proxy_protocol"] = st.booleans()
        more["ssl"] = st.sampled_from([
            server,
            {**server, "client_ca_file": f"{there}/root.pem"},
            {**server, "client_ca_file": f"{there}/root.pem", "verify_client": "optional", "tls_verify_depth": 3},
        ])  # fmt: skip
    if protocol != "tcp":
        more["preserve_case"] = st.booleans()
        more["inject_headers"] = st.just({"X-Key": {"secret": "current"}, "Authorization": {"secret": "previous"}})
    if protocol == "http":
        more["rate_limit"] = st.fixed_dictionaries({
            "requests": st.integers(1, 10**9), "per": st.sampled_from(["50ms", "1s", "1m", "24h"]),
            "by": st.sampled_from(["client", "service"]),
        })  # fmt: skip
        if role == "inbound":
            more["http2"] = st.booleans()
            more["real_ip_header"] = st.sampled_from(["X-Real-IP", "X-Client"])
            secrets = st.sampled_from([["current"], ["current", "previous"]])
            more["origin_verify"] = st.fixed_dictionaries({"header": st.just("X-Origin"), "secrets": secrets})
            more["jwt"] = st.sampled_from([
                {"issuer": "i", "jwks_file": f"{there}/jwks.json", "claims_to_headers": {"sub": "X-S"}},
                {"issuer": "i", "audiences": ["a"], "forward": True, "jwks_uri": "https://[::1]:8443/k"},
            ])  # fmt: skip
    return {**found, **{key: draw(more[key]) for key in sorted(more) if draw(st.booleans())}}


@st.composite
def files(draw: st.DrawFn, there: Path) -> dict[str, Any]:
    """A parsed file."""
    listeners = []
    for role, port in (("inbound", 15006), ("outbound", 15001)):
        own = draw(st.lists(services(there, role), min_size=1, max_size=5))
        listener: dict[str, Any] = {"name": role, "listen": f"[::]:{port} ipv6only=off", "direction": role,
                                    "access": draw(ACCESS), "services": own}  # fmt: skip
        if role == "inbound":
            listener["trusted_ips"] = draw(TRUSTED)
            if draw(st.booleans()):
                listener |= {"upstream": "dataplane", "dataplane_file": f"{there}/dataplane.yaml"}
        listener["allow_metadata_addresses"] = draw(st.booleans())
        if draw(st.booleans()):
            listener["send_proxy_protocol"] = draw(st.sampled_from(["v1", "v2"]))
        listeners.append(listener)
    secrets = {name: {"file": f"{there}/{name}"} for name in ("current", "previous")}
    top = {"access_log": draw(st.booleans()), "limits": {"connections": draw(st.integers(0, 10**6))}}
    return {**top, "secrets": secrets, "listeners": listeners}


@dataclass(frozen=True)
class Connection:
    """A connection as Envoy sees it once the original destination is known."""

    port: int
    source: str
    destination: str
    sender: str
    """Who has connected; another than the source behind a PROXY protocol header."""
    is_http: bool


def expected(settings: Settings, listener: ListenerSettings, connection: Connection) -> str:
    """What the file says: `refused`, or the name of who takes it and how."""
    own = {one.listen.port for one in settings.listeners} if listener.role is Role.INBOUND else {listener.listen.port}
    if connection.port in own:
        return REFUSED
    service = _service(listener, connection)
    if (listener if service is None else service).send_proxy_protocol is not None and any(
        one.startswith("fe80:") for one in (connection.source, connection.destination)
    ):
        return REFUSED
    access = listener.access if service is None else service.access
    if listener.role is Role.OUTBOUND:
        destination = Destination(connection.destination, connection.port, 10 if ":" in connection.destination else 2)
        if not access.admits(connection.destination):
            return REFUSED
        if not listener.allow_metadata_addresses and is_metadata(destination):
            return REFUSED
    if service is not None and service.proxy_protocol and connection.sender not in service.trusted_ips.networks:
        return REFUSED
    if service is not None and is_read_as_http(service, connection):
        forwarded = listener.role is Role.INBOUND and connection.source in service.trusted_ips.forwarders
        return f"{service.name} http{' forwarded' if forwarded else ''}"
    if listener.role is Role.INBOUND and not access.admits(connection.source):
        return REFUSED
    if service is not None:
        return f"{service.name} tcp"
    is_of_dataplane = isinstance(listener.upstream, ServicePorts) and connection.port in listener.upstream.services
    return f"dataplane+{connection.port} tcp" if is_of_dataplane else listener.name


def is_read_as_http(service: Service, connection: Connection) -> bool:
    """Whether requests are told apart."""
    return service.protocol is ServiceProtocol.HTTP or (
        service.protocol is ServiceProtocol.DETECT and connection.is_http
    )


def _service(listener: ListenerSettings, connection: Connection) -> Service | None:
    """The one whose `to` is the most specific, or that has none."""
    best: tuple[int, Service] | None = None
    for service in listener.services:
        if service.port != connection.port:
            continue
        address = ip_address(connection.destination)
        lengths = [one.prefixlen for one in service.to.networks if one.version == address.version and address in one]
        length = max(lengths, default=-1) if service.to else -1
        if (lengths or not service.to) and (best is None or length > best[0]):
            best = (length, service)
    return None if best is None else best[1]


def taken(documents: Documents, listener: ListenerSettings, connection: Connection) -> Resource | None:
    """The filter chain that Envoy takes (config.listener.v3.FilterChainMatch); None: the connection is closed."""
    by_name = {one["name"]: one for one in documents.listeners}
    found = by_name[listener.name]
    handed_on = by_name.get(f"{listener.name}~{connection.port}")
    if handed_on is not None and found.get("use_original_dst"):
        found = handed_on
    chains = found["filter_chains"]
    steps: tuple[Callable[[Resource], int | None], ...] = (
        lambda match: _equal(match.get("destination_port"), connection.port),
        lambda match: _longest(match.get("prefix_ranges"), connection.destination),
        lambda match: _application(match.get("application_protocols"), connection.is_http),
        lambda match: _longest(match.get("direct_source_prefix_ranges"), connection.sender),
        lambda match: _longest(match.get("source_prefix_ranges"), connection.source),
    )
    for score in steps:
        chains = _best(chains, score)
    assert len(chains) <= 1, [chain["name"] for chain in chains]
    return chains[0] if chains else found.get("default_filter_chain")


def _best(chains: Sequence[Resource], score: Callable[[Resource], int | None]) -> list[Resource]:
    """The chains that match best; those that do not ask, if none of those that ask matches. It never goes back."""
    scores = [(score(chain["filter_chain_match"]), chain) for chain in chains]
    best = max((one for one, _ in scores if one is not None), default=-1)
    return [chain for one, chain in scores if one == (best if best >= 0 else None)]


def _equal(asked: int | None, port: int) -> int | None:
    return None if asked is None else 0 if asked == port else -1


def _application(protocols: Sequence[str] | None, is_http: bool) -> int | None:
    return None if protocols is None else 0 if is_http else -1


def _longest(ranges: Sequence[Resource] | None, host: str) -> int | None:
    """The length of the longest network with an address, -1 for none; None: no network is asked for."""
    if not ranges:
        return None
    address = ip_address(host)
    networks = [ip_network((one["address_prefix"], one["prefix_len"])) for one in ranges]
    return max((one.prefixlen for one in networks if one.version == address.version and address in one), default=-1)


def admits(chain: Resource, client: str) -> bool:
    """Whether the access rules among a chain's HTTP filters admit a client."""
    filters = chain["filters"][-1]["typed_config"]["http_filters"]
    for one in filters:
        if one["name"] != "envoy.filters.http.rbac":
            continue
        rules = one["typed_config"]["rules"]
        ranges = [principal["remote_ip"] for principal in rules["policies"]["access"]["principals"]]
        return ((_longest(ranges, client) or 0) >= 0) is (rules["action"] == "ALLOW")
    return True


def described(chain: Resource | None, listener: ListenerSettings) -> str:
    """What a chain does, in the words of `expected`."""
    if chain is None or [one["name"] for one in chain["filters"]] == [REFUSED]:
        return REFUSED
    kind = chain["filters"][-1]["typed_config"]
    name = str(kind["stat_prefix"]).removeprefix(f"{listener.name}~")
    if not kind["@type"].endswith("HttpConnectionManager"):
        return name if name == listener.name else f"{name} tcp"
    return f"{name} http{' forwarded' if 'original_ip_detection_extensions' in kind else ''}"


def admitting(access: Access) -> list[str]:
    """The addresses that access rules admit, of those that are tried."""
    return [one for one in ADDRESSES if access.admits(one)]
