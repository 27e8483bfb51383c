"""Services and secrets in the YAML file: everything that is wrong, at once, with its place; nothing secret repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.relay.settings.examples import assert_problems
from tests.unit.relay.settings.examples import settings as for_the_relay
from tpctl.config.values import BadValueError
from tpctl.config.yaml_text import parse_yaml
from tpctl.envoy.settings import settings_of
from tpctl.relay.settings.headers import own_header
from tpctl.relay.settings.jwks import read_jwks
from tpctl.relay.settings.model import Settings
from tpctl.system.errors import InputError

TOP = "secrets: {known: {file: /s}}\nlisteners:\n- listen: '*:15006'\n  direction: inbound\n  services:\n"
OUT = TOP.replace("15006", "15001").replace("inbound", "outbound")
DNS = "listeners: [{listen: '*:15006', direction: inbound}, {listen: '*:15053', direction: dns"
PLACE = "file e.yaml: listeners[0].services[0]"
KEY = {"kty": "RSA", "n": "AQAB", "e": "AQAB"}


def settings(text: str) -> Settings:
    return settings_of(parse_yaml(text), "e.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        settings(text)
    return list(raised.value.problems)


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("{protocol: http}", ".port: is missing"),
        ("{port: 0}", '.port: 0 is not a port'),
        ("{port: 80, protocol: https}", '.protocol: "https" is not one of tcp, http, detect'),
        ("{port: 80, jwt: {issuer: a, jwks_uri: 'https://h/'}}", ".jwt: needs protocol: http"),
        ("{port: 80, real_ip_header: X-Real-IP}", ".real_ip_header: needs protocol: http"),
        ("{port: 80, protocol: detect, rate_limit: {requests: 1, per: 1s}}",
         ".rate_limit: needs protocol: http; with detect a client could get past it"),
        ("{port: 80, to: [10.0.0.0/8]}", ".to: is for outbound listeners"),
        ("{port: 80, proxy_protocol: true}", ".proxy_protocol: needs trusted_ips"),
        ("{port: 80, access: {default: deny}}", ".access: admits nobody"),
        ("{port: 80, access: {allow: [10.0.0.0/9, 10.128.0.0/9], deny: [10.0.0.0/8]}}", ".access: admits nobody"),
        ("{port: 80, access: {deny: [0.0.0.0/0, '::/0']}}", ".access: admits nobody"),
        ("{port: 80, protocol: http, origin_verify: {header: X-O}}", ".origin_verify.secrets: is missing"),
        ("{port: 80, protocol: http, origin_verify: {header: X-O, secrets: []}}",
         ".origin_verify.secrets: names no secret"),
        ("{port: 80, protocol: http, origin_verify: {header: 'X O', secrets: [known]}}",
         '.origin_verify.header: "X O" is not the name of a header'),
        ("{port: 80, protocol: http, origin_verify: {header: 'X:O', secrets: [known]}}",
         '.origin_verify.header: "X:O" is not the name of a header'),
        ("{port: 80, protocol: http, origin_verify: {header: X_O, secrets: [known]}}",
         '.origin_verify.header: "X_O": headers with an underscore are not passed on'),
        ("{port: 80, protocol: http, inject_headers: {Host: {secret: known}}}",
         '.inject_headers: "Host" says how a message is sent'),
        ("{port: 80, protocol: http, inject_headers: {X-Forwarded-For: {secret: known}}}",
         '.inject_headers: "X-Forwarded-For" is set by the data plane itself'),
        ("{port: 80, protocol: http, inject_headers: {X-A: {}}}", ".inject_headers.X-A: needs {secret: NAME}"),
        ("{port: 80, protocol: http, real_ip_header: X-Envoy-Internal}",
         '.real_ip_header: "X-Envoy-Internal" is set by the data plane itself'),
        ("{port: 80, protocol: http, jwt: {jwks_uri: 'https://h/'}}", ".jwt.issuer: is missing"),
        ("{port: 80, protocol: http, jwt: {issuer: a}}", ".jwt.jwks_file: give either jwks_file or jwks_uri"),
        ("{port: 80, protocol: http, jwt: {issuer: a, jwks_uri: 'http://h/'}}",
         '.jwt.jwks_uri: "http://h/" is not a URL that begins with https://'),
        ("{port: 80, protocol: http, jwt: {issuer: a, jwks_uri: 'https://h/', claims_to_headers: {sub: host}}}",
         '.jwt.claims_to_headers.sub: "host" says how a message is sent'),
        ("{port: 8, protocol: http, jwt: {issuer: a, jwks_uri: 'https://h/', claims_to_headers: {a: Authorization}}}",
         '.jwt.claims_to_headers.a: "Authorization" is how clients prove who they are'),
        ("{port: 80, protocol: http, jwt: {issuer: a, jwks_uri: 'https://h/', claims_to_headers: {a: X-A, b: x-a}}}",
         ".jwt.claims_to_headers: the header x-a is given to two claims"),
        ("{port: 80, protocol: http, real_ip_header: X-A, inject_headers: {x-a: {secret: known}}}",
         ".inject_headers: the header x-a is used twice: real_ip_header and inject_headers"),
        ("{port: 80, protocol: http, rate_limit: {requests: 0, per: 1s}}",
         ".rate_limit.requests: 0 is not a whole number from 1"),
        ("{port: 80, protocol: http, rate_limit: {requests: 1, per: 0}}", ".rate_limit.per: 0 is not within 50ms and"),
        ("{port: 80, protocol: http, jwt: {issuer: a, jwks_uri: 'https://a b/'}}", '.jwt.jwks_uri: "https://a b'),
        ("7", ": 7 is a value where keys are expected"),
        ("{port: 80, upstream: dataplane}", ".upstream: dataplane is for listeners"),
        ("{port: 80, ssl: {certificate: /a}}", ".ssl.certificate_key: is missing"),
        ("{port: 80, protcol: tcp}", '.protcol: there is no such key; did you mean "protocol"?'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_service(service: str, expected: str) -> None:
    (said,) = problems(f"{TOP}  - {service}")
    assert said.startswith(f"{PLACE}{expected}"), said


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        (["{port: 80}", "{port: 80}"], ".port: 80 is also the port of service outbound-80"),
        (["{port: 80}", "{port: 80, name: b}"], ".port: 80 is also the port of service outbound-80"),
        (["{port: 80}", "{port: 81, name: outbound-80}"], ".name: outbound-80 is also the name of another service"),
        (["{port: 80, to: [10.0.0.0/8]}", "{port: 80, name: b, to: [10.0.0.0/8, 11.0.0.0/8]}"],
         ".to: 10.0.0.0/8 belongs to service outbound-80 already"),
    ],
)  # fmt: skip
def test_services_that_could_not_be_told_apart(services: list[str], expected: str) -> None:
    (said,) = problems(OUT + "".join(f"  - {one}\n" for one in services))
    assert said.startswith(f"file e.yaml: listeners[0].services[1]{expected}"), said


@pytest.mark.parametrize("key", ["origin_verify: {header: A, secrets: [known]}", "jwt: {issuer: a, jwks_uri: 'https://h'}",
                                 "real_ip_header: X-A", "proxy_protocol: false", "trusted_ips: []",
                                 "ssl: {certificate: /a, certificate_key: /b}"])  # fmt: skip
def test_what_is_for_those_who_come_in(key: str) -> None:
    (said,) = problems(f"{OUT}  - {{port: 80, protocol: http, {key}}}")
    assert said == f"{PLACE}.{key.partition(':')[0]}: is for inbound listeners"


def test_every_problem_is_told_at_once() -> None:
    said = problems(f"{TOP}  - {{port: 0, protocol: x, jwt: {{}}, access: {{allow: [x]}}}}\n  - {{ssl: {{}}}}")
    assert len(said) >= 7, said


@pytest.mark.parametrize(
    ("secrets", "expected"),
    [
        ("{a: hunter2}", "secrets.a: a secret is not written into this file; write {file: /PATH}"),
        ("{a: [hunter2]}", "secrets.a: a secret is not written into this file"),
        ("{a: {value: hunter2, file: /f}}", "secrets.a.value: there is no such key"),
        ("{a: {}}", "secrets.a: needs either a file or a credential"),
        ("{a: {file: /f, credential: c}}", "secrets.a: needs either a file or a credential"),
        ("{a: {file: relative}}", 'secrets.a.file: "relative" is not an absolute path'),
        ("{a: {credential: ../hunter}}", 'secrets.a.credential: "../hunter" is not the name of a credential'),
        ("{'a b': {file: /f}}", 'secrets.a b: "a b" is not a name'),
        ("hunter2", "secrets: is not a mapping"),
    ],
)  # fmt: skip
def test_a_secret_is_never_in_the_file(secrets: str, expected: str) -> None:
    (said,) = problems(f"secrets: {secrets}\nlisteners: [{{listen: '*:15006', direction: inbound}}]")
    assert said.startswith(f"file e.yaml: {expected}"), said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    "service",
    ["{port: 80, protocol: http, origin_verify: {header: X-O, secrets: [hunter2]}}",
     "{port: 80, protocol: http, inject_headers: {X-O: {secret: hunter2}}}"],
)  # fmt: skip
def test_a_secret_in_place_of_its_name_is_not_repeated(service: str) -> None:
    (said,) = problems(f"{TOP}  - {service}")
    assert "that is not the name of a secret; those of the section secrets at the top: known" in said
    assert "hunter2" not in said


def test_the_relay_names_who_serves_such_a_file() -> None:
    text = f"{TOP}  - {{port: 80}}\n  trusted_ips: {{x_forwarded_for: [10.0.0.1]}}"
    assert_problems(
        lambda: for_the_relay(text),
        [
            "file r.yaml: secrets: nothing of the relay's uses any; `tpctl envoy` serves such a file",
            "file r.yaml: listener inbound-15006: services: the relay passes connections on as they are; `tpctl envoy`",
            "file r.yaml: listener inbound-15006: trusted_ips.x_forwarded_for: the relay reads no HTTP; `tpctl envoy`",
        ],
    )


@pytest.mark.parametrize(
    ("listener", "expected"),
    [
        ("direction: inbound, upstream_tls: {tls_verify_depth: 2, server_name: a}",
         "upstream_tls.tls_verify_depth: Envoy does not enforce it"),
        ("direction: inbound, upstream_tls: {}", "upstream_tls.server_name: is missing"),
        ("direction: inbound, limits: {connections_per_source: 3}",
         "limits.connections_per_source: only `tpctl relay`"),
        ("direction: inbound, limits: {connections: 3}, services:"
         " [{port: 80, proxy_protocol: true, trusted_ips: [10.0.0.1]}]",
         "limits.connections: Envoy does not count the connections of services with proxy_protocol"),
        ("direction: inbound, timeouts: {half_closed: 3}", "timeouts.half_closed: only `tpctl relay`"),
        ("direction: inbound, source: client", "source: client needs an inbound listener with transparent"),
        ("direction: inbound, services: [{port: 80, upstream: '127.0.0.1:15006'}]",
         "service inbound-80: upstream: 127.0.0.1:15006 is a listener's own"),
        ("direction: inbound, services: [{port: 15006}]",
         "service inbound-15006: port: 15006 is a listener's own, to which nobody may connect"),
        ("direction: inbound, trusted_ips: ['10.0.0.1', 'unix:'], services: [{port: 80, trusted_ips: []}]",
         "trusted_ips: unix: only `tpctl relay`"),
    ],
)  # fmt: skip
def test_what_only_the_relay_does(listener: str, expected: str) -> None:
    said = problems(f"listeners: [{{name: one, listen: '*:15006', {listener}}}]")
    assert said[0].startswith(f"file e.yaml: listener one: {expected}"), said


def test_what_only_the_relay_does_for_all() -> None:
    said = problems(
        "accelerate: sockmap\nlisteners: "
        "[{listen: '*:1 proxy_protocol', direction: inbound, trusted_ips: [10.0.0.1]},"
        " {listen: 'unix:/a', direction: outbound, upstream: '127.0.0.1:1'}]"
    )
    assert [line.removeprefix("file e.yaml: ").partition(": only")[0] for line in said] == [
        "accelerate", "listener inbound-1: listen: proxy_protocol for every port",
        "listener outbound-a: listen: a unix socket",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listeners: [{listen: '*:15053', direction: dns}]",
         "listeners: all of them are for DNS, so there is nothing for Envoy; `tpctl relay --config` serves them"),
        (f"dns: {{zone: a}}\n{TOP}  - {{port: 80}}",
         "dns: has no effect without a listener for DNS, as in {listen: '*:15053', direction: dns}"),
        (f"dns: {{metrics: '*:9903'}}\n{TOP}  - {{port: 80}}", "dns: has no effect without a listener for DNS"),
        (f"{DNS}, services: [{{port: 80}}]}}]", "listeners[1].services: has no meaning for DNS; leave it out"),
        (f"{DNS}, limits: {{connections: 3}}}}]", "listeners[1].limits: has no meaning for DNS; leave it out"),
        (f"{DNS}, ssl: {{certificate: /a, certificate_key: /b}}}}]",
         "listener dns-15053: ssl: has no effect without the option ssl in listen"),
        (f"{DNS}, upstream: '10.0.0.1:53'}}]",
         "listener dns-15053: upstream: DNS goes to the name servers of dns.resolv_conf; leave it out"),
        (f"metrics: '127.0.0.1:9902'\ndns: {{metrics: '127.0.0.1:9902'}}\n{DNS}}}]",
         "dns.metrics: 127.0.0.1:9902 is also where metrics are; give each an address of its own"),
        (f"dns: {{metrics: '127.0.0.1:15053'}}\n{DNS}}}]",
         "dns.metrics: 127.0.0.1:15053 is also where listener dns-15053 listens"),
        (f"dns: {{metrics: nowhere}}\n{DNS}}}]", 'dns.metrics: "nowhere" is not an address'),
        (f"dns: {{metric: '*:1'}}\n{DNS}}}]", 'dns.metric: there is no such key; did you mean "metrics"?'),
        ("listeners: [{listen: '*:15006', direction: inbound, services: [{port: 15053}]},"
         " {listen: '*:15053', direction: dns}]",
         "listener inbound-15006: service inbound-15053: port: 15053 is a listener's own"),
    ],
)  # fmt: skip
def test_dns_beside_envoy(text: str, expected: str) -> None:
    (said,) = problems(text)
    assert said.removeprefix("file e.yaml: ").startswith(expected)


def test_the_relay_serves_the_figures_of_dns_with_all_others() -> None:
    expected = (
        "file r.yaml: dns.metrics: the relay serves the figures of DNS with all others; write metrics, at the top"
    )
    assert_problems(lambda: for_the_relay(f"dns: {{metrics: '127.0.0.1:9903'}}\n{DNS}}}]"), [expected])


def test_who_is_trusted_may_be_told_apart() -> None:
    text = f"{TOP}  - {{port: 80, protocol: http, trusted_ips: {{proxy_protocol: 10.0.0.1, x_forwarded_for: []}}}}"
    (service,) = settings(text).listeners[0].services
    assert "10.0.0.1" in service.trusted_ips
    assert not service.trusted_ips.forwarders
    (said,) = problems(f"{TOP}  - {{port: 80, protocol: http, trusted_ips: {{xff: []}}}}")
    assert said.startswith(f"{PLACE}.trusted_ips: xff is none of proxy_protocol, x_forwarded_for")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not JSON"),
        ("[]", "is not a JWKS"),
        ('{"keys": []}', "is not a JWKS"),
        ('{"keys": [1]}', 'keys[0] is not a key: it has no "kty"'),
        (json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}), "keys[0] is a shared secret"),
        (json.dumps({"keys": [KEY, {**KEY, "d": "secret"}]}), "keys[1] is a private key"),
        (json.dumps({"keys": [{"kty": "RSA", "n": "x"}]}), "keys[0] lacks e"),
        (json.dumps({"keys": [{"kty": "XYZ"}]}), 'keys[0] has "kty" XYZ'),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_jwks_that_is_none(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(content)
    with pytest.raises(BadValueError) as raised:
        read_jwks(path)
    assert expected in str(raised.value)
    assert "c2VjcmV0" not in str(raised.value)


def test_a_jwks_is_the_same_whatever_its_layout(tmp_path: Path) -> None:
    for number, (key, indent) in enumerate(((KEY, None), (dict(reversed(KEY.items())), 3))):
        (tmp_path / f"{number}").write_text(json.dumps({"keys": [key]}, indent=indent))
    assert read_jwks(tmp_path / "0") == read_jwks(tmp_path / "1")


@given(st.text(max_size=20))
def test_every_name_of_a_header_can_stand_in_a_program(text: str) -> None:
    """It is put between quotes in Lua."""
    try:
        name = own_header(text)
    except BadValueError:
        return
    assert not set(name) & set('"\\\r\n\t {}_')
    assert name.isascii()
