"""From a configuration and the facts of a host to a policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.unit.config.resolving import FakeHost, dns_socket, problems, resolved
from tpctl.cli.printing.print_config import as_yaml
from tpctl.config.load import load
from tpctl.config.resolve import Resolved, resolve
from tpctl.spec.policy import Cgroup, DnsCapture, Family, Policy
from tpctl.system.errors import InputError


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
        "outbound_exclude_marks": "0x10", "exclude_interfaces": "tun0",
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
    assert resolved(FakeHost(ipv6=False)).policy.families == frozenset(Family), "an address may come at any time"
    assert resolved(FakeHost(ipv6=False)).notices == ()
    without = resolved(FakeHost(ipv6=False, ipv6_turned_on=False))
    assert without.policy.families == {Family.IPV4}
    assert "it is turned off on this host" in without.notices[0]
    (problem,) = problems(FakeHost(ipv6_turned_on=False))
    assert "net.ipv6.conf.lo.disable_ipv6=0" in problem
    assert "--ip-family-mode ipv4" in problem
    assert resolved(FakeHost(ipv6_turned_on=False), ip_family_mode="ipv4").policy.families == {Family.IPV4}
    chosen = resolved(ip_family_mode="IPv4")
    assert chosen.policy.families == {Family.IPV4}
    assert "bypasses the data plane" in chosen.notices[0]
    assert resolved(FakeHost(ipv6=False), ip_family_mode="ipv4").notices == ()


def test_an_ipv6_network_without_ipv6() -> None:
    notices = resolved(ip_family_mode="ipv4", virtual_networks="a:fd00::/64,b:10.0.0.0/8").notices
    assert [notice for notice in notices if "has no effect" in notice and "a:fd00::/64" in notice]
    assert not any("b:10" in notice for notice in notices)


def test_loopback() -> None:
    assert resolved(FakeHost(loopback_name="loop")).policy.loopback == "loop"
    assert "no loopback interface" in problems(FakeHost(loopback_name=None))[0]
