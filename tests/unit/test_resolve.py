"""From configuration and host facts to a policy. The host is a value here; tests/unit/host has the real one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent.cli.print_config import as_yaml
from agent.config import load
from agent.errors import HostError, InputError
from agent.host.facts import Host
from agent.host.sockets import Listener
from agent.policy import Address, Cgroup, DnsCapture, Family, NameServer, Policy, Protocol, contains
from agent.resolve import Resolved, resolve


@dataclass
class FakeHost:
    """A host made of plain values."""

    users: dict[str, int] = field(default_factory=lambda: {"5678": 5678, "kuma-dp": 5678, "root": 0, "0": 0})
    loopback_name: str | None = "lo"
    ipv6: bool = True
    local: tuple[str, ...] = ("127.0.0.0/8", "::1/128", "192.0.2.2/32")
    resolv: str | None = "nameserver 10.0.0.53\nnameserver fd00::53\n"
    sockets: tuple[Listener, ...] = ()
    processes: dict[int, int] = field(default_factory=dict)
    ssh_session: int | None = None
    cgroups: dict[str, int] = field(default_factory=lambda: {"system.slice/app.service": 7})
    process_groups: dict[int, str] = field(default_factory=dict)

    def uid_of(self, user: str) -> int | None:
        return self.users.get(user)

    def loopback(self) -> str | None:
        return self.loopback_name

    def has_ipv6(self) -> bool:
        return self.ipv6

    def is_local(self, address: Address) -> bool:
        return contains([ip_network(network) for network in self.local], address)

    def resolv_conf(self, path: str) -> str:
        if self.resolv is None:
            raise HostError(f"{path} cannot be read: No such file or directory")
        return self.resolv

    def listeners(self, protocol: Protocol) -> tuple[Listener, ...]:
        return tuple(one for one in self.sockets if one.protocol is protocol)

    def process_uid(self, listener: Listener) -> int | None:
        return self.processes.get(listener.inode)

    def cgroup(self, path: str) -> Cgroup:
        if path not in self.cgroups:
            raise HostError(f"there is no control group {path}")
        return Cgroup(path, self.cgroups[path])

    def process_cgroup(self, listener: Listener) -> str | None:
        return self.process_groups.get(listener.inode)

    def ssh_session_port(self) -> int | None:
        return self.ssh_session


def resolved(host: Host | None = None, /, **flags: str) -> Resolved:
    """What flags, by option name, come to on a host."""
    return resolve(load(flags={name: [value] for name, value in flags.items()}), host or FakeHost())


def problems(host: Host | None = None, /, **flags: str) -> tuple[str, ...]:
    """What is wrong with them."""
    with pytest.raises(InputError) as caught:
        resolved(host, **flags)
    return caught.value.problems


def dns_socket(address: str, uid: int, inode: int = 1) -> Listener:
    """A UDP socket bound to port 53."""
    return Listener(Protocol.UDP, ip_address(address), 53, uid, inode)


def test_defaults_are_the_default_policy() -> None:
    assert resolved() == Resolved(Policy(proxy_uid=5678), resolved().options, ())


APP = "system.slice/app.service"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"engine": "nftables"},
        {"iptables_mode": "legacy"},
        {"dns_enabled": "true"},
        {"cgroup": APP},
        {"cgroup": APP, "inbound_include_ports": "80"},
    ],
)
def test_a_printed_configuration_comes_to_the_same(tmp_path: Path, flags: dict[str, str]) -> None:
    # What is a default there is written down, and must not count as a wish: nobody asked for iptables.
    printed = tmp_path / "config.yaml"
    printed.write_text(as_yaml(load(flags={name: [value] for name, value in flags.items()})))
    again, direct = resolve(load(files=[str(printed)]), FakeHost()), resolved(**flags)
    assert again.policy == direct.policy
    assert bool(again.options.iptables_because) == bool(direct.options.iptables_because)
    assert dataclasses.replace(again.options, iptables_because=None) == dataclasses.replace(
        direct.options, iptables_because=None
    )


def test_everything_arrives_in_the_policy_and_the_options() -> None:
    flags = {
        "inbound_enabled": "false", "inbound_port": "1", "inbound_exclude_ports": "2", "inbound_include_ports": "3",
        "inbound_exclude_sources": "10.0.0.0/8", "inbound_insert": "true", "inbound_mode": "tproxy",
        "outbound_enabled": "false", "outbound_port": "4", "outbound_exclude_ports": "5", "outbound_include_ports": "6",
        "outbound_exclude_destinations": "10.0.0.0/8", "outbound_exclude_uids": "tcp:7:8", "outbound_insert": "true",
        "dns_enabled": "true", "dns_port": "9", "dns_tcp": "true", "dns_skip_zone_split": "true",
        "virtual_networks": "a:10.0.0.0/8", "drop_invalid": "true", "log_enabled": "true", "log_level": "1",
        "engine": "iptables", "iptables_mode": "legacy", "comments_disabled": "true", "wait": "1",
        "wait_interval": "2", "max_retries": "3", "sleep_between_retries": "4s", "verbose": "true",
        "store_firewalld": "true", "firewalld_reload": "true",
    }  # fmt: skip
    result = resolved(**flags)
    default = resolved()
    policy, options = result.policy, result.options
    for changed, same in ((policy.inbound, default.policy.inbound), (policy.outbound, default.policy.outbound)):
        assert all(getattr(changed, name) != getattr(same, name) for name in changed.__slots__)
    assert (policy.dns.port, policy.dns.tcp, policy.dns.split_zones) == (9, True, False)
    assert (policy.drop_invalid, policy.log_level, len(policy.virtual_networks)) == (True, 1, 1)
    unchanged = [name for name in options.__slots__ if getattr(options, name) == getattr(default.options, name)]
    assert unchanged == ["executables", "ebpf_cgroup", "ebpf_bpffs"]


@pytest.mark.parametrize("spelling", [APP, f"/{APP}/", f"/sys/fs/cgroup/{APP}"])
def test_beside_a_cgroup_only_named_ports_that_arrive_are_redirected(spelling: str) -> None:
    alone = resolved(cgroup=spelling)
    assert alone.policy.cgroup == Cgroup(APP, 7)
    assert not alone.policy.inbound.enabled
    assert any("--include-inbound-ports" in notice for notice in alone.notices)
    named = resolved(cgroup=spelling, inbound_include_ports="8080")
    assert (named.policy.inbound.enabled, named.notices) == (True, ())


def test_a_cgroup_that_is_not_there_and_ports_of_other_services_are_problems() -> None:
    assert "no control group a.slice" in problems(cgroup="a.slice")[0]
    for flags in ({"inbound_enabled": "true"}, {"inbound_exclude_ports": "22"}):
        assert "--include-inbound-ports" in problems(cgroup=APP, **flags)[0]
    assert resolved(cgroup=APP, inbound_enabled="false").policy.inbound.enabled is False


@pytest.mark.parametrize("bad", ["/", "a/../b", "a//b", 'a"b', "a/."])
def test_what_is_no_cgroup_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match="--cgroup"):
        load(flags={"cgroup": [bad]})


def test_a_local_resolver_outside_the_cgroup_cannot_loop() -> None:
    host = FakeHost(resolv="nameserver 127.0.0.53\n", sockets=(dns_socket("127.0.0.53", 101),), processes={1: 101})
    assert "loop" in problems(host, dns_capture_all="true")[0]
    assert resolved(host, dns_capture_all="true", cgroup=APP).policy.dns.capture is DnsCapture.ALL
    host.process_groups[1] = f"{APP}/below"
    assert "loop" in problems(host, dns_capture_all="true", cgroup=APP)[0]


def test_kumactls_spellings_choose_the_ebpf_engine() -> None:
    result = resolved(
        experimental_engine="true",
        ebpf_enabled="true",
        ebpf_cgroup="/sys/fs/cgroup",
        ebpf_bpffs="/sys/fs/bpf",
        ebpf_instance_ip="10.0.0.1",
        ebpf_programs_source_path="/tmp/kuma-ebpf",
        ebpf_tc_attach_iface="eth0",
    )
    options = result.options
    assert (options.engine, options.ebpf_cgroup, options.ebpf_bpffs) == ("ebpf", "/sys/fs/cgroup", "/sys/fs/bpf")
    assert sum("has no effect" in notice for notice in result.notices) == 3


def test_ebpf_options_beside_another_engine() -> None:
    assert "contradicts" in problems(ebpf_enabled="true", engine="nftables")[0]
    assert any("without --engine ebpf" in notice for notice in resolved(ebpf_bpffs="/sys/fs/bpf").notices)
    assert "absolute path" in problems(engine="ebpf", ebpf_cgroup="app.slice")[0]
    assert resolved(ebpf_enabled="false").options.engine == "auto"


def test_log_level_without_logs_logs_nothing() -> None:
    assert resolved(log_level="3").policy.log_level is None


def test_executables_of_an_incomplete_family_are_left_to_detection() -> None:
    whole = ",".join(f"ip6tables{suffix}:/x" for suffix in ("", "-save", "-restore"))
    result = resolved(executables=f"iptables:/a,{whole}")
    assert set(result.options.executables) == {"ip6tables", "ip6tables-save", "ip6tables-restore"}
    assert any("ignored for iptables" in notice for notice in result.notices)


@pytest.mark.parametrize(
    ("users", "given", "uid"),
    [
        ({"5678": 5678, "kuma-dp": 9}, "", 5678),
        ({"kuma-dp": 9}, "", 9),
        ({"envoy": 7}, "envoy", 7),
        ({"7": 7}, "7", 7),
    ],
)
def test_proxy_user(users: dict[str, int], given: str, uid: int) -> None:
    assert resolved(FakeHost(users=users), proxy_user=given).policy.proxy_uid == uid


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("envoy", 'flag --kuma-dp-user: there is no user "envoy" on this host'),
        ("77", 'flag --kuma-dp-user: there is no user "77" on this host'),
        ("", "this host has neither uid 5678 nor a user"),
    ],
)
def test_unknown_proxy_user(given: str, problem: str) -> None:
    (said,) = problems(FakeHost(users={}), proxy_user=given)
    assert problem in said


def test_root_as_the_data_plane_is_a_warning() -> None:
    (said,) = resolved(proxy_user="root").notices
    assert said.startswith("warning: flag --kuma-dp-user: the data plane runs as root")


def test_families() -> None:
    assert resolved().policy.families == frozenset(Family)
    without = resolved(FakeHost(ipv6=False))
    assert without.policy.families == {Family.IPV4}
    assert "no interface but loopback has an IPv6 address" in without.notices[0]
    chosen = resolved(ip_family_mode="IPv4")
    assert chosen.policy.families == {Family.IPV4}
    assert "goes past the data plane" in chosen.notices[0]
    assert resolved(FakeHost(ipv6=False), ip_family_mode="ipv4").notices == ()


def test_an_ipv6_network_without_ipv6() -> None:
    notices = resolved(ip_family_mode="ipv4", virtual_networks="a:fd00::/64,b:10.0.0.0/8").notices
    assert [notice for notice in notices if "has no effect" in notice and "a:fd00::/64" in notice]
    assert not any("b:10" in notice for notice in notices)


def test_loopback() -> None:
    assert resolved(FakeHost(loopback_name="loop")).policy.loopback == "loop"
    assert "no loopback interface" in problems(FakeHost(loopback_name=None))[0]


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


def test_no_server_at_all() -> None:
    (said,) = problems(FakeHost(resolv="search example.org\n"), dns_enabled="true")
    assert said.startswith("flag --redirect-dns: /etc/resolv.conf lists no name server")


def test_no_resolv_conf() -> None:
    (said,) = problems(FakeHost(resolv=None), dns_enabled="true", resolv_conf="/x")
    assert said == "flag --resolv-conf: /x cannot be read: No such file or directory"
    assert resolved(FakeHost(resolv=None), dns_capture_all="true").policy.dns.capture is DnsCapture.ALL
    assert resolved(FakeHost(resolv=None)).policy.dns.capture is DnsCapture.OFF


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
    assert said.startswith("warning: 127.0.0.53 of /etc/resolv.conf is a resolver on this host that does not run now")


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
    host = FakeHost(users={}, loopback_name=None, resolv="")
    assert len(problems(host, dns_enabled="true")) == 3
