"""The relay's configuration: listeners as nginx writes them, the YAML file, and every problem at once."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.relay.settings.examples import FULL, assert_problems, settings
from tpctl.config.values import BadValueError
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.flags import Flags
from tpctl.relay.settings.listen import Keepalive, Listen, read_listen
from tpctl.relay.settings.model import FixedAddress, OriginalDestination, Role, Source

V6 = socket.AF_INET6
ANY = Destination("0.0.0.0", 15006)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*:15006", Listen(ANY)),
        ("0.0.0.0:15006 backlog=16384", Listen(ANY, backlog=16384)),
        ("[::]:15006", Listen(Destination("::", 15006, V6), ipv6only=True)),
        ("[::]:15006 ipv6only=off", Listen(Destination("::", 15006, V6), ipv6only=False)),
        ("*:15006 transparent proxy_protocol ssl reuseport bind deferred",
         Listen(ANY, transparent=True, proxy_protocol=True, ssl=True, reuseport=True, bind=True, deferred=True)),
        ("*:15006 so_keepalive=on", Listen(ANY, keepalive=Keepalive(True))),
        ("*:15006 so_keepalive=off", Listen(ANY, keepalive=Keepalive(False))),
        ("*:15006 so_keepalive=30m::10", Listen(ANY, keepalive=Keepalive(True, 1800, None, 10))),
        ("*:15006 so_keepalive=60:5s:3", Listen(ANY, keepalive=Keepalive(True, 60, 5, 3))),
        ("unix:/run/r.sock proxy_protocol", Listen(PurePosixPath("/run/r.sock"), proxy_protocol=True)),
    ],
)  # fmt: skip
def test_listeners_are_written_as_for_nginx(text: str, expected: Listen) -> None:
    assert read_listen(text) == expected


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["is not an address"]),
        ("15006", ["is not an address; write ADDRESS:PORT"]),
        ("localhost:80", ["is not an address"]),
        ("::1:80", ["is not an address"]),
        ("[127.0.0.1]:80", ["is not an address"]),
        ("[fe80::1%eth0]:80", ["is not an address"]),
        ("*:0", ["is not a port"]),
        ("*:65536", ["is not a port"]),
        ("unix:relative", ["absolute path"]),
        ("unix:/" + "x" * 107, ["at most 107 bytes"]),
        ("*:80 reuseprot", ['did you mean "reuseport"']),
        ("*:80 ssl=on", ["ssl takes no value"]),
        ("*:80 backlog", ["backlog needs a value"]),
        ("*:80 backlog=0", ["backlog=0 is not a whole number from 1"]),
        ("*:80 backlog=x ipv6only=maybe", ["backlog=x", "ipv6only=maybe", "ipv6only is not possible on the IPv4"]),
        ("*:80 ssl ssl", ["ssl is given twice"]),
        ("*:80 so_keepalive=::", ["so_keepalive=::: write on, off, or"]),
        ("*:80 so_keepalive=99999:1:1", ["idle is not within 1-32767"]),
        ("*:80 so_keepalive=1:1:1s", ["count is not within 1-127"]),
        ("unix:/x deferred reuseport", ["deferred is not possible", "reuseport is not possible"]),
    ],
)
def test_what_is_wrong_with_a_listener_is_said_at_once(text: str, problems: list[str]) -> None:
    with pytest.raises(BadValueError) as raised:
        read_listen(text)
    assert len(raised.value.problems) == len(problems), raised.value.problems
    for said, expected in zip(raised.value.problems, problems, strict=True):
        assert expected in said


@given(st.text() | st.lists(st.sampled_from([
    "*:1", "[::]:2", "ssl", "backlog=", "so_keepalive=1::", "ipv6only=on", "=", "unix:/"])).map(" ".join))  # fmt: skip
@example("*:1 so_keepalive=²::")
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(BadValueError):
        assert isinstance(read_listen(text), Listen)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("*:80", "127.0.0.1:80", True),
        ("*:80", "*:81", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("[::]:80", "*:80", False),
        ("[::]:80 ipv6only=off", "*:80", True),
        ("127.0.0.1:80", "[::]:80 ipv6only=off", True),
        ("[::1]:80", "127.0.0.1:80", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "*:80", False),
    ],
)
def test_listeners_that_would_take_each_others_connections(one: str, other: str, overlap: bool) -> None:
    assert read_listen(one).overlaps(read_listen(other)) is overlap
    assert read_listen(other).overlaps(read_listen(one)) is overlap


def test_the_flags_alone_are_what_they_always_were() -> None:
    settings = Flags().settings()
    assert [(one.name, one.role, one.source) for one in settings.listeners] == [
        ("inbound", Role.INBOUND, Source.PASSTHROUGH),
        ("outbound", Role.OUTBOUND, Source.KERNEL),
        ("dns", Role.DNS, Source.KERNEL),
    ]
    assert [one.listen for one in settings.listeners] == [
        Listen(Destination("::", port, V6), ipv6only=False) for port in (15006, 15001, 15053)
    ]
    assert all(one.listen.reuseport for one in Flags(workers=2).settings().listeners)


def test_listeners_by_flags() -> None:
    settings = Flags(inbound_listen="*:1506 proxy_protocol", trusted_ips=["10.0.0.0/8,unix:"], metrics="127.0.0.1:9")
    inbound = settings.settings().listeners[0]
    assert inbound.listen == Listen(Destination("0.0.0.0", 1506), proxy_protocol=True)
    assert ("10.1.1.1" in inbound.trusted_ips, None in inbound.trusted_ips) == (True, True)
    assert settings.settings().metrics == Destination("127.0.0.1", 9)


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        (Flags(inbound_listen="*:15006 proxy_protocol"), ["listener inbound: listen: proxy_protocol needs"]),
        (Flags(inbound_listen="*:15001"), ["listeners inbound and outbound: 0.0.0.0:15001 and [::]:15001 overlap"]),
        (Flags(inbound_listen="*:x", trusted_ips=["ten"], metrics="here"),
         ["--trusted-ips: \"ten\"", "--inbound-listen: \"*:x\"", "--metrics: \"here\""]),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_all_named(flags: Flags, problems: list[str]) -> None:
    assert_problems(lambda: flags.settings(), problems)


def test_a_whole_file() -> None:
    found = settings(FULL)
    assert (found.workers, found.drain_seconds, found.access_log, found.user) == (2, 5.0, True, "kuma-dp")
    assert (found.dns.resolv_conf, found.dns.zone) == (Path("/run/resolv.conf"), "internal")
    assert (found.metrics, found.limits.connections) == (Destination("127.0.0.1", 9902), 1000)
    inbound, database, dns = found.listeners
    assert (inbound.name, database.name, dns.name) == ("inbound-15006", "database", "dns-15053")
    assert (inbound.source, inbound.send_proxy_protocol) == (Source.PASSTHROUGH, 2)
    assert [inbound.access.admits(host) for host in ("10.1.0.1", "10.6.0.1", "192.0.2.1")] == [True, False, False]
    assert inbound.limits.connections_per_source == 10
    assert (inbound.timeouts.connect, inbound.timeouts.idle, inbound.timeouts.half_closed) == (0.5, 3600, 30)
    assert (None in inbound.trusted_ips, bool(database.trusted_ips)) == (True, False)
    assert database.upstream == FixedAddress(Destination("192.0.2.7", 5432))
    assert not database.access.admits("192.0.2.7")
    assert (dns.upstream, dns.access.admits("192.0.2.7")) == (OriginalDestination(), True)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["file r.yaml: is empty"]),
        ("[]", ["file r.yaml: [] is a value where keys are expected"]),
        ("listeners: []", ["file r.yaml: listeners: there is none"]),
        ("listeners: 7", ["file r.yaml: listeners: 7 is not a list"]),
        ("listeners: [7]", ["file r.yaml: listeners[0]: 7 is a value where keys are expected",
                            "file r.yaml: listeners[0].listen: is missing",
                            "file r.yaml: listeners[0].direction: is missing"]),
        ("listners: []", ["file r.yaml: listeners: there is none",
                          'file r.yaml: listners: there is no such key; did you mean "listeners"?']),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(text: str, problems: list[str]) -> None:
    assert_problems(lambda: settings(text), problems)


def test_every_problem_of_a_file_is_said_at_once_with_its_place() -> None:
    text = """
workers: 0
metrics: everywhere
timeouts: {conect: 1s, idle: soon}
limits: {connections: -1}
trusted_ips: [10.0.0.1/8]
listeners:
  - listen: "*:15006 fast"
    direction: sideways
    upstream: example.org:80
    access: {allow: [everybody], default: maybe}
    send_proxy_protocol: v3
    ssl: {verify_client: on}
    upstream_tls: {certificate: /c.pem, tls_verify_depth: 1000}
    nmae: x
"""
    where = "file r.yaml: listeners[0]"
    assert_problems(
        lambda: settings(text),
        [
            "file r.yaml: timeouts.idle: \"soon\" is not a time",
            "file r.yaml: timeouts.conect: there is no such key; did you mean \"connect\"?",
            "file r.yaml: trusted_ips: 10.0.0.1/8 has host bits set; write 10.0.0.0/8",
            f"{where}.listen: \"fast\" is not an option of a listener",
            f"{where}.direction: \"sideways\" is not one of inbound, outbound, dns",
            f"{where}.upstream: \"example.org:80\" is not an upstream",
            f"{where}.access.allow: \"everybody\" is not an IP address",
            f"{where}.access.default: \"maybe\" is not one of allow, deny",
            f"{where}.send_proxy_protocol: \"v3\" is not one of v1, v2",
            f"{where}.ssl.certificate: is missing",
            f"{where}.ssl.certificate_key: is missing",
            f"{where}.ssl.verify_client: on needs client_ca_file",
            f"{where}.upstream_tls.certificate: certificate and certificate_key belong together",
            f"{where}.upstream_tls.tls_verify_depth: 1000 is not a whole number",
            f"{where}.nmae: there is no such key; did you mean \"name\"?",
            "file r.yaml: workers: 0 is not a whole number from 1 to 256, nor auto",
            "file r.yaml: metrics: \"everywhere\" is not an address",
            "file r.yaml: limits.connections: -1 is not a whole number",
        ],
    )  # fmt: skip


def test_contradictions_name_the_listener() -> None:
    text = """
metrics: 127.0.0.1:15001
limits: {connections_per_source: 1}
listeners:
  - {listen: "*:15006 ssl", direction: inbound}
  - {listen: "127.0.0.1:15006", direction: outbound, source: passthrough}
  - {listen: "*:15001 proxy_protocol", direction: outbound, ssl: {certificate: a, certificate_key: b}}
  - {listen: "*:15053 deferred", direction: dns, upstream: 192.0.2.1:53, send_proxy_protocol: v1, name: outbound-15001}
  - {listen: "unix:/run/a.sock", direction: inbound, limits: {connections_per_source: 1}}
"""
    assert_problems(
        lambda: settings(text),
        [
            "file r.yaml: listeners: 2 of them are called outbound-15001",
            "file r.yaml: listeners inbound-15006 and outbound-15006: 0.0.0.0:15006 and 127.0.0.1:15006 overlap",
            "file r.yaml: listener inbound-15006: listen: ssl needs a section ssl",
            "file r.yaml: listener outbound-15006: source: passthrough is for inbound listeners",
            "file r.yaml: listener outbound-15001: ssl: has no effect",
            "file r.yaml: listener outbound-15001: listen: proxy_protocol needs trusted_ips",
            "file r.yaml: listener outbound-15001: upstream: DNS goes to the name servers",
            "file r.yaml: listener outbound-15001: listen: deferred is not possible for DNS",
            "file r.yaml: listener outbound-15001: send_proxy_protocol: is not possible for DNS",
            "file r.yaml: listener inbound-a.sock: listen: a unix socket has no original destination",
            "file r.yaml: listener inbound-a.sock: limits.connections_per_source: the clients of a unix socket",
            "file r.yaml: metrics: 127.0.0.1:15001 is also where listener outbound-15001 listens",
            "file r.yaml: limits.connections_per_source: belongs to a listener",
        ],
    )
