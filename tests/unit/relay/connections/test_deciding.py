"""What the relay decides: what to dial and what not, its settings, and when it speaks."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tpctl.cli.commands.relay import command
from tpctl.relay.connections import dials
from tpctl.relay.connections.dials import Dial, SelfDialGuard
from tpctl.relay.loop.complaints import PERIOD_SECONDS, Complaints
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.process.notify import notify
from tpctl.relay.process.privileges import become
from tpctl.relay.settings.flags import Flags
from tpctl.relay.settings.listen import read_listen
from tpctl.spec.policy import NameServer
from tpctl.system import log
from tpctl.system.errors import InputError

PORTS = frozenset({15006, 15001, 15053})
V6 = socket.AF_INET6


def test_an_application_is_dialled_from_the_passthrough_address() -> None:
    meant = Destination("10.0.0.2", 8080)
    assert dials.inbound(meant) == (Dial(meant, "127.0.0.6", Destination("127.0.0.1", 8080)),)
    meant6 = Destination("2001:db8::2", 8080, V6)
    assert dials.inbound(meant6) == (Dial(meant6, "::6", Destination("::1", 8080, V6)),)


def test_a_link_local_application_is_dialled_from_its_own_link() -> None:
    meant = Destination("fe80::2", 8080, V6, 4)
    assert dials.inbound(meant) == (Dial(meant),)
    assert not Destination("fec0::2", 8080, V6).is_link_local


def test_a_server_is_dialled_from_any_address() -> None:
    meant = Destination("2001:db8::2", 443, V6)
    assert dials.outbound(meant) == (Dial(meant),)


def test_name_servers_are_asked_on_port_53() -> None:
    assert dials.name_server(NameServer(IPv4Address("192.0.2.1"))) == Destination("192.0.2.1", 53)
    scoped = NameServer(IPv6Address("fe80::1"), "lo")
    assert dials.name_server(scoped) == Destination("fe80::1", 53, V6, socket.if_nametoindex("lo"))
    with pytest.raises(OSError):
        dials.name_server(NameServer(IPv6Address("fe80::1"), "no-such-if0"))


def guard(*local: str) -> SelfDialGuard:
    return SelfDialGuard(PORTS, lambda destination: destination.host in local)


@pytest.mark.parametrize("port", sorted(PORTS))
@pytest.mark.parametrize("host", ["127.0.0.1", "127.200.3.4", "0.0.0.0", "10.0.0.2", "::1", "::", "2001:db8::2"])
def test_every_own_address_with_every_own_port_is_refused(host: str, port: int) -> None:
    family = V6 if ":" in host else socket.AF_INET
    assert guard("10.0.0.2", "2001:db8::2").refuses(Destination(host, port, family))


@given(st.ip_addresses(v=4).filter(lambda a: not a.is_loopback and int(a)), st.sampled_from(sorted(PORTS)))
def test_own_ports_of_other_hosts_are_dialled(address: IPv4Address, port: int) -> None:
    assert not guard("10.0.0.2").refuses(Destination(str(address), port)) or str(address) == "10.0.0.2"


@given(st.ip_addresses(), st.integers(1, 65535).filter(lambda port: port not in PORTS))
def test_other_ports_are_dialled_without_asking_the_kernel(address: IPv4Address | IPv6Address, port: int) -> None:
    def never(_destination: Destination) -> bool:
        raise AssertionError

    assert not SelfDialGuard(PORTS, never).refuses(Destination(str(address), port))


def test_a_listener_of_one_address_is_reached_there_only() -> None:
    own = guard("10.0.0.2", "10.0.0.3")
    own.watch([read_listen("10.0.0.2:15006"), read_listen("*:15001"), read_listen("unix:/run/x")])
    refused = [(host, port) for host in ("10.0.0.2", "10.0.0.3", "127.0.0.1") for port in (15006, 15001, 80)
               if own.refuses(Destination(host, port))]  # fmt: skip
    assert set(refused) == {("10.0.0.2", 15006), ("10.0.0.2", 15001), ("10.0.0.3", 15001), ("127.0.0.1", 15001)}


def test_the_relay_is_no_name_server_of_its_own() -> None:
    own = SelfDialGuard(frozenset({53}), lambda destination: destination.host == "10.0.0.2")
    servers = [Destination(host, 53) for host in ("127.0.0.1", "10.0.0.2", "192.0.2.1")]
    assert own.others(servers) == (Destination("192.0.2.1", 53),)


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({"inbound_port": 15001}, ["--inbound-port and --outbound-port are both 15001"]),
        ({"inbound_port": 1, "outbound_port": 1, "dns_port": 1}, ["--inbound-port and --outbound-port and --dns-port"]),
        ({"dns_port": 0}, ["--dns-port: 0"]),
        ({"bind_address": "localhost"}, ["--bind-address: 'localhost'"]),
        ({"workers": 0, "drain_seconds": -1.0}, ["--workers: 0", "--drain-timeout: -1"]),
        ({"drain_seconds": float("nan")}, ["--drain-timeout: nan"]),
    ],
)
def test_settings_that_make_no_sense_are_all_named(options: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        Flags.of(options).settings()
    assert len(raised.value.problems) == len(problems)
    for said, expected in zip(raised.value.problems, problems, strict=True):
        assert said.startswith(expected)


@pytest.mark.parametrize("user", ["no-such-user", "4294967296", "-1"])
def test_an_unknown_user_is_bad_input(user: str) -> None:
    with pytest.raises(InputError, match="--user"):
        become(user)


def test_becoming_oneself_changes_nothing() -> None:
    become(str(os.geteuid()))


def test_complaints_are_made_once_a_period() -> None:
    now = itertools.count(0, PERIOD_SECONDS / 4)
    with structlog.testing.capture_logs() as captured:
        complaints = Complaints(structlog.get_logger(), lambda: next(now))
        for _ in range(5):
            complaints.warn("subject")
        complaints.warn("another")
    assert [(line["event"], line.get("silenced")) for line in captured] == [
        ("subject", None),
        ("subject", 3),
        ("another", None),
    ]


@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_is_told_to_systemd(monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        path = f"{directory}/notify"
        manager.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        assert notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("value", [None, "", "relative", "/nonexistent/socket"])
def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify("READY=1")


def test_logs_are_json_away_from_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        log.configure("auto")
        log.get_logger().info("listening", port=15006)
        log.finish()
        line = json.loads(capfd.readouterr().err)
        assert (line["event"], line["level"], line["port"]) == ("listening", "info", 15006)
        log.configure("text")
        log.get_logger().info("listening", port=15006)
        log.finish()
        assert "listening" in capfd.readouterr().err
    finally:
        structlog.reset_defaults()
    with pytest.raises(ValueError, match="yaml"):
        log.configure("yaml")


def test_help_has_an_example_and_says_how_long_a_drain_lasts() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert "tpctl relay --user kuma-dp" in text
    assert "[default: 30.0]" in text


@pytest.mark.parametrize("arguments", [["--inbound-port", "0"], ["--dns-port", "8o"], ["--log-format", "xml"]])
def test_bad_flags_are_bad_input(arguments: list[str]) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2


def test_equal_ports_are_bad_input() -> None:
    result = CliRunner().invoke(command, ["--inbound-port", "15001"])
    assert isinstance(result.exception, InputError)


def test_the_default_resolv_conf_is_the_hosts() -> None:
    assert Flags().settings().dns.resolv_conf == Path("/etc/resolv.conf")
