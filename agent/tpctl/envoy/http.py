"""What is done with requests: the HTTP connection manager of a service and its filters, in their order. Pure.

    access -> rate limit by client -> origin_verify -> jwt -> rate limit of the service -> inject_headers -> router

A limit for all clients together counts only requests that the application would get: otherwise anybody could use it up
for everybody else. The client is the connection's, or the one that X-Forwarded-For names where the sender of
that header is trusted. For everybody else, what a client says about itself is removed before anything reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.envoy.clusters import PRESERVE_CASE, Clusters
from tpctl.envoy.documents import Resource
from tpctl.envoy.secrets import Secrets
from tpctl.envoy.words import APART, clients, duration, extension
from tpctl.relay.settings.access import Access
from tpctl.relay.settings.model import Jwt, ListenerSettings, OriginVerify, RateLimit, Role, Service, Timeouts
from tpctl.relay.settings.partition import admitted

_CLAIMED = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix", "x-forwarded-proto",
            "x-real-ip", "forwarded", "x-forwarded-client-cert")  # fmt: skip
"""Headers in which a proxy tells about its client."""
_HEADERS_TIMEOUT = "60s"
"""For a client to send the headers of a request; nginx's client_header_timeout."""
_CLIENTS = 10_000
"""That are counted by themselves at the same time; beyond, the one that asked longest ago is forgotten."""
_UNLIMITED = {"max_tokens": 10**9, "tokens_per_fill": 10**9, "fill_interval": "1s"}
_V6_CLIENT_BITS = 64
"""An IPv6 client has a whole /64 of addresses (RFC 4291, 2.5.1)."""
_ALWAYS = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
_VERIFY = """\
function envoy_on_request(handle)
  local given, known = handle:headers():get("{header}"), false
  if given ~= nil and given ~= "" and handle:headers():getNumValues("{header}") == 1 then
    for number = 0, {last} do
      local secret = handle:streamInfo():filterState():get("tpctl.origin." .. number)
      if secret ~= nil and secret ~= "" and given == secret then known = true end
    end
  end
  handle:headers():remove("{header}")
  if not known then handle:respond({{[":status"] = "403"}}, "") end
end
"""
"""RBAC cannot read a secret. Strings of Lua are compared by their addresses, so the time says nothing about them."""


@dataclass(frozen=True, slots=True)
class Requests:
    """One service's requests."""

    listener: ListenerSettings
    service: Service
    cluster: str
    secrets: Secrets
    clusters: Clusters
    access_log: list[Resource]

    @property
    def name(self) -> str:
        """Of the service among all."""
        return f"{self.listener.name}{APART}{self.service.name}"

    def manager(self, *, forwarded: bool) -> Resource:
        """The network filter; `forwarded`: for connections whose X-Forwarded-For is trusted."""
        fields: dict[str, Any] = {
            "stat_prefix": self.name,
            "codec_type": "AUTO",
            **self._protocol(),
            **_timeouts(self.listener.timeouts),
            "server_header_transformation": "PASS_THROUGH",
            "generate_request_id": False,
            **self._client(forwarded),
            "upgrade_configs": [{"upgrade_type": "websocket"}],
            "http_filters": list(self._filters()),
            "route_config": self._routes(),
            "access_log": self.access_log,
        }
        if self.service.ssl is not None and self.service.ssl.client_ca_file is not None:
            fields["forward_client_cert_details"] = "SANITIZE_SET"
            fields["set_current_client_cert_details"] = {"subject": True, "uri": True, "dns": True}
        kind = "filters.network.http_connection_manager.v3.HttpConnectionManager"
        return extension("envoy.filters.network.http_connection_manager", kind, **fields)

    def _protocol(self) -> Resource:
        http1: Resource = {"accept_http_10": True, "default_host_for_http_10": "localhost"}
        if self.service.preserve_case:
            http1["header_key_format"] = PRESERVE_CASE
        common: Resource = {"idle_timeout": duration(self.listener.timeouts.idle)}
        if self.listener.role is Role.INBOUND:
            # Servers read X_Real_IP as X-Real-IP, so it would be a way past what is removed here; as for nginx.
            common["headers_with_underscores_action"] = "DROP_HEADER"
        return {
            "common_http_protocol_options": common,
            "http_protocol_options": http1,
            "http2_protocol_options": {"allow_connect": True},
        }

    def _client(self, forwarded: bool) -> Resource:
        """Who the client is."""
        if self.listener.role is not Role.INBOUND:
            return {"use_remote_address": False, "skip_xff_append": True, **_without()}
        if not forwarded:
            return {"use_remote_address": True, **_without(_CLAIMED)}
        trusted = {"cidrs": clients(self.service.trusted_ips.forwarders.networks)}
        return {
            "use_remote_address": False,
            **_without(),
            "original_ip_detection_extensions": [
                extension(
                    "envoy.http.original_ip_detection.xff",
                    "http.original_ip_detection.xff.v3.XffConfig",
                    xff_trusted_cidrs=trusted,
                    skip_xff_append=False,
                )
            ],
        }

    def _filters(self) -> Iterator[Resource]:
        service = self.service
        access = service.access
        if self.listener.role is Role.INBOUND and (access.deny or not access.default_allow):
            yield _admit(access)
        limit = service.rate_limit
        if limit is not None and limit.by_client:
            yield _rate_limit(limit)
        if service.origin_verify is not None:
            yield from self._origin(service.origin_verify)
        if service.jwt is not None:
            yield from self._token(service.jwt)
        if limit is not None and not limit.by_client:
            yield _rate_limit(limit)
        for header, secret in service.inject_headers:
            kind = "http.injected_credentials.generic.v3.Generic"
            value = extension(
                "envoy.http.injected_credentials.generic", kind, credential=self.secrets.generic(secret), header=header
            )
            kind = "filters.http.credential_injector.v3.CredentialInjector"
            yield extension(f"inject{APART}{header}", kind, overwrite=True, credential=value)
        yield extension("envoy.filters.http.router", "filters.http.router.v3.Router", suppress_envoy_headers=True)

    def _origin(self, verify: OriginVerify) -> Iterator[Resource]:
        for index, secret in enumerate(verify.secrets):
            formatter = extension(
                "envoy.formatter.generic_secret",
                "formatter.generic_secret.v3.GenericSecret",
                secret_configs={f"s{index}": self.secrets.generic(secret)},
            )
            value = {
                "object_key": f"tpctl.origin.{index}",
                "factory_key": "envoy.string",
                "format_string": {
                    "text_format_source": {"inline_string": f"%SECRET(s{index})%"},
                    "formatters": [formatter],
                },
            }
            kind = "filters.http.set_filter_state.v3.Config"
            yield extension(f"origin_verify{APART}{index}", kind, on_request_headers=[value])
        code = _VERIFY.format(header=verify.header.lower(), last=len(verify.secrets) - 1)
        kind = "filters.http.lua.v3.Lua"
        yield extension("origin_verify", kind, default_source_code={"inline_string": code})

    def _token(self, jwt: Jwt) -> Iterator[Resource]:
        provider: dict[str, Any] = {
            "issuer": jwt.issuer,
            "audiences": list(jwt.audiences),
            "require_expiration": True,
            "forward": jwt.forward,
            # Without this, a token in the query string would be taken too, and end in logs.
            "from_headers": [{"name": "Authorization", "value_prefix": "Bearer "}],
            "claim_to_headers": [
                {"header_name": header, "claim_name": claim} for claim, header in jwt.claims_to_headers
            ],
        }
        if jwt.jwks is not None:
            provider["local_jwks"] = {"inline_string": jwt.jwks}
        else:
            provider["remote_jwks"] = {
                "http_uri": {"uri": jwt.jwks_uri, "cluster": self.clusters.of_keys(self.name, jwt), "timeout": "5s"},
                "cache_duration": "300s",
                "async_fetch": {"fast_listener": True},
                "retry_policy": {"num_retries": 3},
            }
        if jwt.claims_to_headers:
            removed = {"request_mutations": [{"remove": header} for _, header in jwt.claims_to_headers]}
            yield extension("claims", "filters.http.header_mutation.v3.HeaderMutation", mutations=removed)
        yield extension(
            "envoy.filters.http.jwt_authn",
            "filters.http.jwt_authn.v3.JwtAuthentication",
            providers={"jwt": provider},
            rules=[{"match": {"prefix": "/"}, "requires": {"provider_name": "jwt"}}],
        )

    def _routes(self) -> Resource:
        header = self.service.real_ip_header
        value = "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"
        added = [] if header is None else [
            {"header": {"key": header, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        ]  # fmt: skip
        route = {"match": {"prefix": "/"}, "route": {"cluster": self.cluster, "timeout": "0s"}}
        return {
            "name": self.name,
            # A listener that names a cluster which comes a moment later would be rejected for good.
            "validate_clusters": False,
            "request_headers_to_add": added,
            "request_headers_to_remove": ["x-envoy-external-address"],
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}],
        }


def _without(names: Sequence[str] = ()) -> Resource:
    """Remove headers before anything reads them, and always those by which clients could steer Envoy.

    Such as x-envoy-retry-on; from clients with private addresses it takes them by default.
    """
    mutations: list[Resource] = [{"remove_on_match": {"key_matcher": {"prefix": "x-envoy-", "ignore_case": True}}}]
    mutations += [{"remove": name} for name in names]
    name = "envoy.http.early_header_mutation.header_mutation"
    kind = "http.early_header_mutation.header_mutation.v3.HeaderMutation"
    return {"early_header_mutation_extensions": [extension(name, kind, mutations=mutations)]}


def _timeouts(timeouts: Timeouts) -> Resource:
    return {
        "request_headers_timeout": _HEADERS_TIMEOUT,
        "stream_idle_timeout": duration(timeouts.idle),
    }


def _admit(access: Access) -> Resource:
    """403 for clients whom access does not admit."""
    if access.default_allow:
        action, networks = "DENY", access.deny.networks
    else:
        action, networks = "ALLOW", admitted(access)
    principals = [{"remote_ip": one} for one in clients(networks)]
    policy = {"permissions": [{"any": True}], "principals": principals}
    rules = {"action": action, "policies": {"access": policy}}
    return extension("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", rules=rules)


def _rate_limit(limit: RateLimit) -> Resource:
    bucket = {
        "max_tokens": limit.requests,
        "tokens_per_fill": limit.requests,
        "fill_interval": duration(limit.per),
    }
    fields: Resource = {"token_bucket": bucket}
    if limit.by_client:
        masked = {"v4_prefix_mask_len": 32, "v6_prefix_mask_len": _V6_CLIENT_BITS}
        fields = {
            "token_bucket": _UNLIMITED,
            "descriptors": [{"entries": [{"key": "masked_remote_address"}], "token_bucket": bucket}],
            "max_dynamic_descriptors": _CLIENTS,
            "rate_limits": [{"actions": [{"masked_remote_address": masked}]}],
        }
    return extension(
        "envoy.filters.http.local_ratelimit",
        "filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="rate_limit",
        filter_enabled=_ALWAYS,
        filter_enforced=_ALWAYS,
        **fields,
    )
