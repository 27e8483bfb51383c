"""From a configuration to a policy: which DNS queries are captured, and what would loop or cut off ssh."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tests.unit.config.resolving import FakeHost, dns_socket, problems, resolved
from tpctl.host.facts import Host
from tpctl.host.sockets import Listener
from tpctl.spec.policy import DnsCapture, Family, NameServer, Protocol


def test_listed_dns() -> None:
    host = FakeHost(resolv="# c\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\noptions ndots:1\n")
    result = resolved(host, dns_enabled="true")
    assert result.policy.dns.capture is DnsCapture.LISTED
    assert result.policy.dns.servers == (
        NameServer(ip_address("127.0.0.53")),
        NameServer(ip_address("fe80::1"), "eth0"),
    )
    (notice,) = result.notices
    assert "fe80::1%eth0 are not redirected" in notice


@pytest.mark.parametrize(("text", "missing"), [("nameserver 10.0.0.1", 6), ("nameserver fd00::1", 4)])
def test_no_server_of_a_family(text: str, missing: int) -> None:
    result = resolved(FakeHost(resolv=text), dns_enabled="true")
    assert result.notices == (
        f"warning: /etc/resolv.conf lists no IPv{missing} name server: DNS over IPv{missing} is not redirected",
    )
    assert not result.policy.captures_dns(Family(missing))


@pytest.mark.parametrize("resolv", ["search example.org\n", " nameserver 10.0.0.53\n", ""])
def test_where_no_server_is_named_the_library_asks_this_host(resolv: str) -> None:
    host = FakeHost(resolv=resolv)
    result = resolved(host, dns_enabled="true")
    assert result.policy.dns.servers == (NameServer(ip_address("127.0.0.1")),)
    assert "programs of this host ask 127.0.0.1" in result.notices[-1]
    assert ("warning: /etc/resolv.conf: line 1" in result.notices[0]) == ("nameserver" in resolv)
    (said,) = resolved(host, dns_capture_all="true").notices
    assert "where nothing listens now" in said
    running = FakeHost(resolv=resolv, sockets=(dns_socket("0.0.0.0", 101),))
    assert not [one for one in resolved(running, dns_enabled="true").notices if "loop" in one]
    (problem,) = problems(running, dns_capture_all="true")
    assert "names no name server, and so 127.0.0.1 is asked, a resolver on this host" in problem
    assert "use --redirect-dns instead" in problem
    assert resolved(running, dns_capture_all="true", outbound_exclude_uids="udp:53:101").notices == ()


def test_an_unreadable_resolv_conf() -> None:
    (said,) = problems(FakeHost(resolv=None), dns_enabled="true", resolv_conf="/x")
    assert said == "flag --resolv-conf: /x cannot be read: Permission denied"
    running = FakeHost(resolv=None, sockets=(dns_socket("127.0.0.1", 101),))
    assert "a resolver on this host" in problems(running, dns_capture_all="true")[0]
    assert resolved(FakeHost(resolv=None)).policy.dns.capture is DnsCapture.OFF


def test_a_local_resolver_may_ask_what_is_listed_beside_it() -> None:
    host = FakeHost(resolv="nameserver 127.0.0.1\nnameserver 10.0.0.53\n", sockets=(dns_socket("127.0.0.1", 101),))
    said = [one for one in resolved(host, dns_enabled="true").notices if "loop" in one]
    assert len(said) == 1
    assert "names 127.0.0.1, a resolver on this host, and 10.0.0.53" in said[0]
    assert "udp:53:101" in said[0]
    excluded = resolved(host, dns_enabled="true", outbound_exclude_uids="udp:53:101").notices
    assert not [one for one in excluded if "loop" in one]


def test_a_resolver_asks_over_tcp_too() -> None:
    host = FakeHost(resolv="nameserver 127.0.0.53\n", sockets=(dns_socket("127.0.0.53", 101),))
    flags = {"dns_capture_all": "true", "dns_tcp": "true"}
    (said,) = problems(host, **flags)
    assert "--exclude-outbound-ports-for-uids 53:101," in said
    assert problems(host, **flags, outbound_exclude_uids="udp:53:101")
    assert resolved(host, **flags, outbound_exclude_uids="53:101").notices == ()


@pytest.mark.parametrize(
    ("server", "bound"),
    [("127.0.0.53", "127.0.0.53"), ("::1", "::"), ("192.0.2.2", "0.0.0.0"), ("127.0.0.1", "::")],
)
def test_defect_12_capture_all_with_a_local_resolver_is_refused(server: str, bound: str) -> None:
    host = FakeHost(resolv=f"nameserver {server}\n", sockets=(dns_socket(bound, 101),))
    (said,) = problems(host, dns_capture_all="true")
    assert said.startswith("flag --redirect-all-dns-traffic: ")
    assert f"names {server}, a resolver on this host" in said
    assert "use --redirect-dns instead" in said
    assert "--exclude-outbound-ports-for-uids udp:53:101" in said


def test_the_way_out_names_the_user_the_resolver_runs_as_now() -> None:
    host = FakeHost(resolv="nameserver ::1\n", sockets=(dns_socket("::1", 0, 7),), processes={7: 115})
    assert "udp:53:115," in problems(host, dns_capture_all="true")[0]
    assert resolved(host, dns_capture_all="true", outbound_exclude_uids="udp:53:115")
    assert problems(host, dns_capture_all="true", outbound_exclude_uids="udp:53:0")


@pytest.mark.parametrize("rule", ["udp:53:101", "101", "50-60:100-102"])
def test_capture_all_with_the_resolver_excluded(rule: str) -> None:
    host = FakeHost(resolv="nameserver 127.0.0.53\n", sockets=(dns_socket("127.0.0.53", 101),))
    assert resolved(host, dns_capture_all="true", outbound_exclude_uids=rule).notices == ()


@pytest.mark.parametrize("rule", ["tcp:53:101", "udp:54:101", "udp:53:102"])
def test_capture_all_with_something_else_excluded(rule: str) -> None:
    host = FakeHost(resolv="nameserver 127.0.0.53\n", sockets=(dns_socket("127.0.0.53", 101),))
    assert problems(host, dns_capture_all="true", outbound_exclude_uids=rule)


def test_capture_all_while_the_local_resolver_does_not_run() -> None:
    host = FakeHost(resolv="nameserver 127.0.0.53\n", sockets=(dns_socket("10.9.9.9", 101),))
    assert "udp:53:UID" in problems(host, dns_capture_all="true")[0]
    (said,) = resolved(host, dns_capture_all="true", outbound_exclude_uids="udp:53:101").notices
    assert said.startswith("warning: 127.0.0.53 of /etc/resolv.conf is a resolver on this host that is not running now")


@pytest.mark.parametrize(
    ("server", "owner"),
    [("10.0.0.53", 101), ("127.0.0.11", 101), ("127.0.0.1", 5678)],
    ids=["remote", "docker", "the data plane itself"],
)
def test_capture_all_where_nothing_loops(server: str, owner: int) -> None:
    host = FakeHost(resolv=f"nameserver {server}\n", sockets=(dns_socket("0.0.0.0", owner),))
    result = resolved(host, dns_capture_all="true")
    assert result.policy.dns.capture is DnsCapture.ALL
    assert result.policy.dns.servers == ()


def ssh(address: str, port: int = 22) -> Listener:
    """An sshd."""
    return Listener(Protocol.TCP, ip_address(address), port, 0, 1)


@pytest.mark.parametrize(
    ("host", "flags", "warned"),
    [
        (FakeHost(sockets=(ssh("0.0.0.0"),)), {}, [22]),
        (FakeHost(sockets=(ssh("0.0.0.0"), ssh("::"))), {}, [22]),
        (FakeHost(sockets=(ssh("0.0.0.0"),), ssh_session=2222), {"ssh_guard": "true"}, [22, 2222]),
        (FakeHost(sockets=(ssh("127.0.0.1"),)), {}, []),
        (FakeHost(sockets=(ssh("0.0.0.0", 80),)), {}, []),
        (FakeHost(sockets=(ssh("::"),)), {"inbound_exclude_ports": "20-30"}, []),
        (FakeHost(sockets=(ssh("::"),)), {"inbound_include_ports": "80"}, []),
        (FakeHost(sockets=(ssh("::"),)), {"inbound_include_ports": "22"}, [22]),
        (FakeHost(sockets=(ssh("::"),)), {"inbound_enabled": "false"}, []),
    ],
)
def test_defect_1_ssh_is_never_lost_without_a_warning(host: Host, flags: dict[str, str], warned: list[int]) -> None:
    notices = [notice for notice in resolved(host, **flags).notices if "ssh" in notice]
    assert len(notices) == len(warned)
    for notice, port in zip(notices, warned, strict=True):
        assert f"(port {port})" in notice
        assert ("leave it out of --include" if "inbound_include_ports" in flags else f"ports {port} keeps") in notice


@pytest.mark.parametrize(
    ("flags", "excluded", "included"),
    [
        ({}, ["2222"], []),
        ({"inbound_exclude_ports": "80"}, ["80", "2222"], []),
        ({"inbound_include_ports": "80,2000-3000"}, [], ["80", "2000-2221", "2223-3000"]),
        ({"inbound_include_ports": "2222-2223"}, [], ["2223"]),
        ({"inbound_include_ports": "2222,80"}, [], ["80"]),
        ({"inbound_exclude_ports": "2222"}, ["2222"], []),
        ({"inbound_include_ports": "80"}, [], ["80"]),
    ],
)
def test_the_ssh_session_that_installs_is_left_alone(
    flags: dict[str, str], excluded: list[str], included: list[str]
) -> None:
    result = resolved(FakeHost(sockets=(ssh("::", 2222),), ssh_session=2222), **flags)
    inbound = result.policy.inbound
    assert [str(port) for port in inbound.exclude_ports] == excluded
    assert [str(port) for port in inbound.include_ports] == included
    changed = flags not in ({"inbound_exclude_ports": "2222"}, {"inbound_include_ports": "80"})
    assert len(result.notices) == changed
    assert not changed or "--no-ssh-guard" in result.notices[0]


def test_the_ssh_guard_does_not_turn_included_ports_into_all_ports() -> None:
    (problem,) = problems(FakeHost(ssh_session=22), inbound_include_ports="22")
    assert "--no-ssh-guard" in problem
    declined = resolved(FakeHost(ssh_session=22), inbound_include_ports="22", ssh_guard="true")
    assert str(declined.policy.inbound.include_ports[0]) == "22"


def test_firewalld_reload_alone_is_pointed_out() -> None:
    assert "no effect without --store-firewalld" in resolved(firewalld_reload="true").notices[0]


def test_problems_are_reported_together() -> None:
    host = FakeHost(users={}, loopback_name=None, resolv=None)
    assert len(problems(host, dns_enabled="true")) == 3
