"""The known defects of kumactl, by their numbers in docs/kumactl.md, 1 to 12: connections, rules, rollbacks and DNS."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.netns import kumactl_host
from tests.netns.kumactl_host import CONTAINERS, INSTALL, REMOTE, ask, echo_works, outbound, plane, stream
from tests.netns.lab import APP, PROXY, PROXY_USER, installed, run, snapshot, tpctl
from tests.netns.relay.net import until
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, gateway, member
from tpctl.rehearsal.rehearse import rehearse
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Family, NameServer, Policy, VirtualNetwork

pytestmark = pytest.mark.root

lab = kumactl_host.lab


def test_01_install_warns_before_it_captures_ssh(lab: Lab) -> None:
    with lab.inside(HOST), socket.create_server(("0.0.0.0", 22)):
        said = tpctl(*INSTALL).stderr
        quiet = tpctl(*INSTALL, "--exclude-inbound-ports", "22").stderr
        tpctl("uninstall")
    assert "--exclude-inbound-ports 22" in said
    assert "ssh" not in quiet


@pytest.mark.parametrize(("client", "server"), [(HOST, PEER), (PEER, HOST)])
def test_02_install_on_a_host_whose_conntrack_was_idle_keeps_connections(
    lab: Lab, variant: str, client: str, server: str
) -> None:
    address = PEER_ADDRESS[Family.IPV4] if server == PEER else HOST_ADDRESS[Family.IPV4]
    near, far = stream(lab, client, server, address, 8081)
    with near, far, installed(lab, "--iptables-mode", variant):
        assert echo_works(near, far)
        assert echo_works(far, near)


@pytest.mark.parametrize("engine", ["nftables", "nft", "legacy"])
def test_03_connections_through_the_data_plane_survive_an_uninstall(lab: Lab, engine: str) -> None:
    flags = ["--engine", "nftables"] if engine == "nftables" else ["--iptables-mode", engine]
    with lab.inside(HOST):
        before = snapshot(counters=False)["nft"]
        tpctl("install", "--kuma-dp-user", PROXY_USER, *flags)
    with lab.inside(HOST, PROXY):
        listening = socket.create_server(("0.0.0.0", 15001))
    with listening, lab.inside(HOST, APP):
        near = socket.create_connection((str(REMOTE), 8080), timeout=60)
        far, _ = listening.accept()
    far.settimeout(60)
    with near, far:
        with lab.inside(HOST):
            assert "may finish" in tpctl("uninstall").stderr
            assert "TPCTL" not in run(["nft", "list", "ruleset"]).stdout
            assert '"draining": 1' in tpctl("status", "--json", check=False).stdout
        assert echo_works(near, far)
        assert echo_works(far, near)
        assert ask(lab, outbound(lab, REMOTE, 8080)) == f"{PEER}:8080"
    with lab.inside(HOST):
        assert '"draining": 0' in tpctl("status", "--json", check=False).stdout
        until(lambda: snapshot(counters=False)["nft"] == before)  # who waits for the end may be at it


def test_03_connections_from_the_data_planes_address_survive_an_uninstall(lab: Lab) -> None:
    def has_address() -> bool:
        return "::6/128" in run(["ip", "-6", "address", "show", "dev", "lo"]).stdout

    address = str(HOST_ADDRESS[Family.IPV6])
    with lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER)
        assert has_address()
    with lab.inside(HOST, APP):
        listening = socket.create_server((address, 8082), family=socket.AF_INET6)
    with listening, lab.inside(HOST, PROXY):
        near = socket.create_connection((address, 8082), timeout=60, source_address=("::6", 0))
        far, _ = listening.accept()
    far.settimeout(60)
    with near, far, lab.inside(HOST):
        assert "1 connection runs from ::6" in tpctl("uninstall").stderr
        assert '"draining": 1' in tpctl("status", "--json", check=False).stdout
        assert echo_works(near, far)
        assert echo_works(far, near)
    with lab.inside(HOST):
        assert '"draining": 0' in tpctl("status", "--json", check=False).stdout
        until(lambda: not has_address())  # who waits for the end may be at it


def test_04_forwarded_connections_are_left_alone(lab: Lab, variant: str) -> None:
    plane(lab)
    container = member(CONTAINERS)
    with installed(lab, "--iptables-mode", variant):
        assert ask(lab, lab.layout.arriving(container, REMOTE, "tcp", 8080)) == f"{PEER}:8080"
        assert ask(lab, lab.layout.arriving(REMOTE, container, "tcp", 8080)) == "docker0:8080"
        assert ask(lab, lab.layout.arriving(container, gateway(CONTAINERS), "tcp", 8080)) == f"{HOST}:15006"


def test_05_a_failing_family_rolls_the_other_one_back(lab: Lab, tmp_path: Path) -> None:
    broken = tmp_path / "ip6tables-restore"
    broken.write_text("#!/bin/sh\necho 'ip6tables-restore: line 3 failed' >&2\nexit 1\n")
    broken.chmod(0o755)
    tools = [f"{tool}:/usr/sbin/{tool}" for tool in ("iptables", "iptables-save", "iptables-restore")]
    tools += ["ip6tables:/usr/sbin/ip6tables", "ip6tables-save:/usr/sbin/ip6tables-save", f"ip6tables-restore:{broken}"]
    with installed(lab, "--exclude-inbound-ports", "22"), lab.inside(HOST):
        before = snapshot(counters=False)
        status = tpctl("status", "--json", check=False).stdout
        failed = tpctl(
            *INSTALL, "--redirect-inbound-port", "16006", "--iptables-executables", ",".join(tools), check=False
        )
        assert failed.returncode == 1
        assert "line 3 failed" in failed.stderr
        assert "rolled back" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert snapshot(counters=False) == before
        assert tpctl("status", "--json", check=False).stdout == status


def test_06_rules_added_by_others_meanwhile_stay_with_their_counters(lab: Lab, variant: str) -> None:
    tool = f"iptables-{variant}"
    with lab.inside(HOST):
        run([tool, "-t", "nat", "-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "RETURN", "-c", "7", "700"])
        before = run([f"{tool}-save", "-c", "-t", "nat"]).stdout
    with installed(lab, "--iptables-mode", variant), lab.inside(HOST):
        run([tool, "-t", "nat", "-I", "OUTPUT", "1", "-p", "udp", "--dport", "10", "-j", "RETURN", "-c", "3", "300"])
        tpctl(*INSTALL, "--iptables-mode", variant, "--redirect-inbound-port", "16006")
    with lab.inside(HOST):
        after = run([f"{tool}-save", "-c", "-t", "nat"]).stdout
    rules = [line for line in after.splitlines() if "-A " in line]
    assert rules[0].startswith("[3:300] -A OUTPUT -p udp -m udp --dport 10")
    assert [line for line in before.splitlines() if "-A " in line] == rules[1:]


def test_08_dns_of_a_virtual_network_is_answered_beside_captured_dns(variant: str) -> None:
    server = NameServer(ip_address("192.0.2.53"))
    policy = Policy(
        PROXY,
        dns=Dns(capture=DnsCapture.LISTED, servers=(server,)),
        virtual_networks=(VirtualNetwork("docker0", CONTAINERS),),
    )
    rehearsal = rehearse(policy, EngineOptions(iptables_mode=variant))
    queries = [result for result in rehearsal.results if "container's DNS" in result.probe.label]
    assert queries
    assert all(result.ok for result in queries)


def test_09_dns_over_tcp_passes_in_insert_mode_too(lab: Lab, variant: str, tmp_path: Path) -> None:
    plane(lab)
    flags = ["--redirect-dns", "--resolv-conf", resolv_conf(tmp_path, "192.0.2.53")]
    with installed(lab, "--iptables-mode", variant, *flags, "--redirect-outbound-insert-instead-of-append"):
        assert ask(lab, outbound(lab, "192.0.2.53", 53)) == f"{PEER}:53"
        assert ask(lab, outbound(lab, "192.0.2.53", 53, protocol="udp")) == f"{HOST}:15053"


def resolv_conf(folder: Path, *servers: str) -> str:
    file = folder / "resolv.conf"
    file.write_text("".join(f"nameserver {server}\n" for server in servers))
    return str(file)


def test_10_inbound_exclusion_by_uid_is_refused_instead_of_switching_inbound_off(lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('redirect: {inbound: {excludePortsForUIDs: ["1000"]}}\n')
    with lab.inside(HOST):
        failed = tpctl(*INSTALL, "--config", str(config), check=False)
    assert failed.returncode == 2
    assert "redirect.inbound.excludePortsForUIDs" in failed.stderr


def test_11_a_scoped_name_server_does_not_capture_everything(variant: str) -> None:
    scoped = NameServer(ip_address("fe80::53"), "eth0")
    policy = Policy(PROXY, dns=Dns(capture=DnsCapture.LISTED, servers=(scoped,)))
    rehearsal = rehearse(policy, EngineOptions(iptables_mode=variant))
    met = {result.probe.label: str(result.answer) for result in rehearsal.results if "DNS to" in result.probe.label}
    assert met["IPv6 DNS to another server"] == "peer:53"
    assert rehearsal.ok


def test_12_capturing_all_dns_beside_a_local_resolver_is_refused(lab: Lab, tmp_path: Path) -> None:
    flags = ["--redirect-all-dns-traffic", "--resolv-conf", resolv_conf(tmp_path, "127.0.0.53")]
    with lab.inside(HOST):
        failed = tpctl(*INSTALL, *flags, check=False)
        assert failed.returncode == 2
        assert "--redirect-dns" in failed.stderr
        assert "loop" in failed.stderr
        tpctl(*INSTALL, *flags, "--exclude-outbound-ports-for-uids", "udp:53:101")
        tpctl("uninstall")
