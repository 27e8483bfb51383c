"""The list `services` of a listener in the YAML file: what is done with the connections to one port, by Envoy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tpctl.config.values import BadValueError, quoted, read_port, shown
from tpctl.relay.loop.networks import NONE
from tpctl.relay.settings import section as read
from tpctl.relay.settings.headers import claim_header, own_header, real_ip_header
from tpctl.relay.settings.hosts import is_host
from tpctl.relay.settings.jwks import read_jwks
from tpctl.relay.settings.model import (
    Jwt,
    OriginVerify,
    RateLimit,
    Role,
    Secret,
    Service,
    ServiceProtocol,
    TrustedSources,
    Upstream,
)
from tpctl.relay.settings.partition import admitted
from tpctl.relay.settings.section import ConfigSection
from tpctl.relay.settings.tls import client_tls, server_tls
from tpctl.relay.settings.upstream import read_address_or_original

MAX_SERVICES = 1000
MAX_REQUESTS = 10**9
MAX_PERIOD = 24 * 3600.0
_HTTP_ONLY = ("origin_verify", "inject_headers", "jwt", "rate_limit", "real_ip_header", "http2", "preserve_case")
_INBOUND_ONLY = ("origin_verify", "jwt", "real_ip_header", "ssl", "proxy_protocol", "trusted_ips")
_EVADED = ("origin_verify", "jwt", "rate_limit", "real_ip_header", "ssl")
"""Not with `detect`: a client whose first bytes do not look like HTTP, or come late, would get past them."""


class Surroundings(NamedTuple):
    """What a service's section depends on."""

    role: Role
    secrets: Mapping[str, Secret]
    trusted_ips: TrustedSources
    """The listener's."""
    upstream: Upstream
    """Of services that do not name one."""


def read_services(section: ConfigSection, surroundings: Surroundings) -> tuple[Service, ...]:
    """The services of a listener's section; problems are noted there."""
    trees = section.items("services")
    if len(trees) > MAX_SERVICES:
        section.complain("services", f"there are {len(trees)}, and at most {MAX_SERVICES} are possible")
        trees = trees[:MAX_SERVICES]
    if trees and surroundings.role is Role.DNS:
        section.complain("services", "has no meaning for DNS; leave it out")
    found: list[Service] = []
    for index, tree in enumerate(trees):
        one = ConfigSection(tree, f"{section.place}.services[{index}]", section.problems)
        service = _service(one, surroundings)
        for other in found:
            _tell_apart(one, service, other)
        found.append(service)
    return tuple(found)


def _tell_apart(section: ConfigSection, service: Service, other: Service) -> None:
    """Complain about a service that could not be told from one before it."""
    if service.port == 0:  # there is none, or none that could be read
        return
    same = set(service.to.networks) & set(other.to.networks)
    if service.port == other.port and not service.to and not other.to:
        section.complain("port", f"{service.port} is also the port of service {other.name}; a port has one service")
        return
    if service.port == other.port and same:
        section.complain("to", f"{', '.join(sorted(map(str, same)))} belongs to service {other.name} already")
    if service.name == other.name:
        section.complain("name", f"{service.name} is also the name of another service; give each a name of its own")


def _service(section: ConfigSection, surroundings: Surroundings) -> Service:
    if "port" not in section and not section.is_another_value:
        section.complain("port", "is missing")
    port = section.take("port", _port, 0)
    protocol = ServiceProtocol(section.take("protocol", read.one_of(*ServiceProtocol), ServiceProtocol.TCP))
    known = len(section.problems)
    service = Service(
        name=section.take("name", read.name, f"{surroundings.role}-{port}"),
        port=port,
        to=section.take("to", read.networks, NONE),
        protocol=protocol,
        upstream=section.take("upstream", read_address_or_original, surroundings.upstream),
        access=read.access(section),
        trusted_ips=section.take("trusted_ips", read.trusted, surroundings.trusted_ips),
        origin_verify=_origin_verify(section, surroundings),
        inject_headers=_inject_headers(section, surroundings),
        jwt=_jwt(section.section("jwt")) if "jwt" in section else None,
        rate_limit=_rate_limit(section.section("rate_limit")) if "rate_limit" in section else None,
        real_ip_header=section.take("real_ip_header", real_ip_header, None),
        ssl=server_tls(section.section("ssl")) if "ssl" in section else None,
        upstream_tls=client_tls(section.section("upstream_tls")) if "upstream_tls" in section else None,
        proxy_protocol=section.take("proxy_protocol", read.flag, False),
        send_proxy_protocol=section.take("send_proxy_protocol", read.proxy_protocol_version, None),
        http2=section.take("http2", read.flag, False),
        preserve_case=section.take("preserve_case", read.flag, False),
    )
    section.finish(("jwt", "rate_limit", "ssl", "upstream_tls"))
    _fit(section, service, surroundings)
    if len(section.problems) == known:
        _fit_headers(section, service)
    return service


def _port(value: object) -> int:
    return read_port(value, lambda _note: None)


def _fit(section: ConfigSection, service: Service, surroundings: Surroundings) -> None:
    """Keys that mean nothing together."""
    protocol, role = service.protocol, surroundings.role
    for key in _HTTP_ONLY:
        if key in section and protocol is ServiceProtocol.TCP:
            section.complain(key, "needs protocol: http")
    for key in _EVADED:
        if key in section and protocol is ServiceProtocol.DETECT:
            section.complain(key, "needs protocol: http; with detect a client could get past it by sending late")
    if role is Role.OUTBOUND:
        for key in _INBOUND_ONLY:
            if key in section:
                section.complain(key, "is for inbound listeners")
    elif "to" in section:
        section.complain("to", "is for outbound listeners; to this host there is only the port")
    if service.http2 and "ssl" not in section:
        section.complain("http2", "has no effect without ssl; HTTP/2 without TLS needs no setting")
    if service.proxy_protocol and not service.trusted_ips:
        section.complain("proxy_protocol", "needs trusted_ips, the networks whose headers are trusted")
    if service.proxy_protocol and protocol is ServiceProtocol.DETECT:
        section.complain("proxy_protocol", "is not possible with protocol: detect")
    if not admitted(service.access):
        section.complain("access", "admits nobody; name in allow who may pass")


def _fit_headers(section: ConfigSection, service: Service) -> None:
    """Complain about a header that two keys want."""
    users: dict[str, list[str]] = {}

    def use(header: str | None, key: str) -> None:
        if header is not None:
            users.setdefault(header.lower(), []).append(key)

    use(service.real_ip_header, "real_ip_header")
    for header, _ in service.inject_headers:
        use(header, "inject_headers")
    for _, header in service.jwt.claims_to_headers if service.jwt else ():
        use(header, "jwt.claims_to_headers")
    use(service.origin_verify.header if service.origin_verify else None, "origin_verify.header")
    for header, keys in users.items():
        if len(keys) > 1 and set(keys) != {"origin_verify.header", "inject_headers"}:
            section.complain(keys[-1], f"the header {header} is used twice: {' and '.join(keys)}")


def _origin_verify(section: ConfigSection, surroundings: Surroundings) -> OriginVerify | None:
    if "origin_verify" not in section:
        section.section("origin_verify")
        return None
    own = section.section("origin_verify")
    for key in ("header", "secrets"):
        if key not in own:
            own.complain(key, "is missing")
    found = OriginVerify(
        own.take("header", own_header, "x"),
        own.take("secrets", lambda value: _secret_names(value, surroundings), ()),
    )
    own.finish()
    return found


def _secret_names(value: object, surroundings: Surroundings) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names:
        raise BadValueError("names no secret, so nobody would get in")
    return tuple(_secret_name(name, surroundings) for name in names)


def _secret_name(value: object, surroundings: Surroundings) -> str:
    if not isinstance(value, str) or value not in surroundings.secrets:
        # It may be a secret that was written here by mistake: not repeated.
        known = ", ".join(map(shown, surroundings.secrets)) or "there are none"
        raise BadValueError(f"that is not the name of a secret; those of the section secrets at the top: {known}")
    return value


def _inject_headers(section: ConfigSection, surroundings: Surroundings) -> tuple[tuple[str, str], ...]:
    own = section.section("inject_headers")
    found = []
    for key in own.names():
        try:
            header = own_header(key)
        except BadValueError as bad:
            section.complain("inject_headers", str(bad))
        else:
            one = own.section(key)
            if "secret" not in one:
                own.complain(key, "needs {secret: NAME}")
            found.append((header, one.take("secret", lambda value: _secret_name(value, surroundings), "")))
            one.finish()
    return tuple(found)


def _jwt(section: ConfigSection) -> Jwt:
    if "issuer" not in section:
        section.complain("issuer", "is missing; it is compared with a token's iss")
    if ("jwks_file" in section) == ("jwks_uri" in section):
        section.complain("jwks_file", "give either jwks_file or jwks_uri, where the keys are")
    jwks_file = section.take("jwks_file", read.path, None)
    jwks = section.take("jwks_file", read_jwks, None) if jwks_file is not None else None
    if "jwks_ca_file" in section and "jwks_uri" not in section:
        section.complain("jwks_ca_file", "has no effect without jwks_uri")
    found = Jwt(
        section.take("issuer", read.text, ""),
        section.take("audiences", _texts, ()),
        jwks_file,
        jwks,
        section.take("jwks_uri", _https, None),
        section.take("jwks_ca_file", read.path, None),
        _claims(section),
        section.take("forward", read.flag, False),
    )
    section.finish()
    return found


def _texts(value: object) -> tuple[str, ...]:
    return tuple(read.text(one) for one in (value if isinstance(value, list) else [value]))


def _https(value: object) -> str:
    url = read.text(value)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "https" or not is_host(parts.hostname or "") or parts.username or port == 0 or parts.fragment:
        raise BadValueError(f"{quoted(value)} is not a URL that begins with https:// and names a host")
    return url


def _claims(section: ConfigSection) -> tuple[tuple[str, str], ...]:
    own = section.section("claims_to_headers")
    found = tuple((key, own.take(key, claim_header, "x")) for key in own.names())
    headers = [header.lower() for _, header in found]
    for header in dict.fromkeys(one for one in headers if one != "x" and headers.count(one) > 1):
        section.complain("claims_to_headers", f"the header {header} is given to two claims")
    return found


def _rate_limit(section: ConfigSection) -> RateLimit:
    for key in ("requests", "per"):
        if key not in section:
            section.complain(key, "is missing")
    found = RateLimit(
        section.take("requests", read.whole(1, MAX_REQUESTS), 1),
        section.take("per", _period, 1.0),
        section.take("by", read.one_of("client", "service"), "client") == "client",
    )
    section.finish()
    return found


def _period(value: object) -> float:
    """Seconds. Envoy fills its buckets at most every 50 ms (LocalRateLimit, token_bucket)."""
    found = read.seconds(value)
    if not 0.05 <= found <= MAX_PERIOD:
        raise BadValueError(f"{quoted(value)} is not within 50ms and 24h")
    return found


def files_of(service: Service) -> list[tuple[str, Path, bool]]:
    """The files that a service names: the key, the path, and whether it is a private key."""
    found = []
    for section in ("ssl", "upstream_tls"):
        for name in ("certificate", "certificate_key", "client_ca_file", "ca_file"):
            path = getattr(getattr(service, section), name, None)
            if path is not None:
                found.append((f"{section}.{name}", path, name == "certificate_key"))
    if service.jwt is not None:
        for name in ("jwks_file", "jwks_ca_file"):
            if (path := getattr(service.jwt, name)) is not None:
                found.append((f"jwt.{name}", path, False))
    return found
