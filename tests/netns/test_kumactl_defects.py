"""None of kumactl's known defects: one test a number of docs/kumactl.md, on real packets where it concerns packets.

Number 7 (firewalld) is in tests/netns/test_firewalld.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import re
import socket
import stat
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent.decide import Connection
from agent.engine_options import EngineOptions
from agent.policy import Dns, DnsCapture, Family, NameServer, Policy, Protocol, VirtualNetwork
from agent.rehearsal.lab import Lab
from agent.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, Bridge, Layout, gateway, member
from agent.rehearsal.rehearse import rehearse
from agent.rehearsal.sockets import Answer
from tests.netns.lab import APP, PROXY, PROXY_USER, installed, run, snapshot, tpctl

pytestmark = pytest.mark.root

INSTALL = ("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables")
REMOTE = ip_address("203.0.113.7")
CONTAINERS = ip_network("172.31.0.0/24")
KUMA_RULES = """\
*nat
:KUMA_MESH_INBOUND - [0:0]
:KUMA_MESH_INBOUND_REDIRECT - [0:0]
:KUMA_MESH_OUTBOUND - [0:0]
:KUMA_MESH_OUTBOUND_REDIRECT - [0:0]
-A PREROUTING -p tcp -m comment --comment "kuma/mesh/transparent/proxy/x" -j KUMA_MESH_INBOUND
-I OUTPUT 1 -p udp --dport 53 -m owner --uid-owner 65534 -m comment --comment "kuma/mesh/transparent/proxy/y" -j RETURN
-A OUTPUT -p tcp -m comment --comment "kuma/mesh/transparent/proxy/z" -j KUMA_MESH_OUTBOUND
-A KUMA_MESH_INBOUND -p tcp -j KUMA_MESH_INBOUND_REDIRECT
-A KUMA_MESH_INBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A KUMA_MESH_OUTBOUND -m owner --uid-owner 65534 -j RETURN
-A KUMA_MESH_OUTBOUND -p tcp -j KUMA_MESH_OUTBOUND_REDIRECT
-A KUMA_MESH_OUTBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15001
COMMIT
"""
KUMA_RULES_WITHOUT_COMMENTS = re.sub(r'-m comment --comment "[^"]*" ', "", KUMA_RULES)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Our host, another host, and a container behind a bridge."""
    with Lab(Layout(bridges=(Bridge("docker0", (CONTAINERS,)),))) as made:
        yield made


def plane(lab: Lab) -> None:
    lab.serve_data_plane(Policy(PROXY))


def ask(lab: Lab, connection: Connection) -> str:
    lab.serve(connection)
    return str(lab.dial(connection))


def outbound(lab: Lab, destination: object, port: int, uid: int = APP, protocol: str = "tcp") -> Connection:
    return lab.layout.outgoing(protocol, ip_address(str(destination)), port, uid)


def stream(lab: Lab, client: str, server: str, address: object, port: int) -> tuple[socket.socket, socket.socket]:
    """A connection that stays open: the client's and the server's end."""
    with lab.inside(server):
        listening = socket.create_server(("0.0.0.0", port))
    with lab.inside(client, APP if client == HOST else 0):
        near = socket.create_connection((str(address), port), timeout=10)
    far, _ = listening.accept()
    listening.close()
    far.settimeout(10)
    return near, far


def echo_works(near: socket.socket, far: socket.socket) -> bool:
    near.sendall(b"ping")
    if far.recv(16) != b"ping":
        return False
    far.sendall(b"pong")
    return near.recv(16) == b"pong"


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
        near = socket.create_connection((str(REMOTE), 8080), timeout=10)
        far, _ = listening.accept()
    far.settimeout(10)
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
        assert snapshot(counters=False)["nft"] == before


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
        near = socket.create_connection((address, 8082), timeout=10, source_address=("::6", 0))
        far, _ = listening.accept()
    far.settimeout(10)
    with near, far, lab.inside(HOST):
        assert "1 connection runs from ::6" in tpctl("uninstall").stderr
        assert '"draining": 1' in tpctl("status", "--json", check=False).stdout
        assert echo_works(near, far)
        assert echo_works(far, near)
    with lab.inside(HOST):
        assert '"draining": 0' in tpctl("status", "--json", check=False).stdout
        assert not has_address()


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


def test_13_family_mode_in_any_case_durations_and_several_files(lab: Lab, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text('redirect: {inbound: {port: "16006"}}\n')
    second.write_text("redirect: {outbound: {port: 16001}}\n")
    flags = [
        "--ip-family-mode",
        "IPv4",
        "--sleep-between-retries",
        "2s",
        "--config",
        str(first),
        "--config",
        str(second),
    ]
    with installed(lab, *flags), lab.inside(HOST):
        assert "TPCTL" not in run(["ip6tables-save"]).stdout
        rules = run(["iptables-save"]).stdout
    assert "--to-ports 16006" in rules
    assert "--to-ports 16001" in rules


def test_14_large_uids_and_many_ports_install_and_nonsense_is_refused(lab: Lab, variant: str) -> None:
    plane(lab)
    ports = ",".join(str(port) for port in range(100, 200, 2))
    exclude = ["--exclude-outbound-ports-for-uids", f"tcp:{ports}:4000000000"]
    with installed(lab, "--iptables-mode", variant, "--exclude-outbound-ports", ports, *exclude):
        assert ask(lab, outbound(lab, REMOTE, 198)) == f"{PEER}:198"
        assert ask(lab, outbound(lab, REMOTE, 199)) == f"{HOST}:15001"
    for value in ("tcp:200-100:1", "tcp:1-2-3:1", "tcp:80:4294967295", "sctp:80:1"):
        with lab.inside(HOST):
            failed = tpctl(*INSTALL, "--exclude-outbound-ports-for-uids", value, check=False)
            assert (failed.returncode, value in failed.stderr) == (2, True), failed.stderr
            assert "TPCTL" not in run(["iptables-save"]).stdout


def test_15_an_interface_named_twice_is_refused(lab: Lab) -> None:
    with lab.inside(HOST):
        failed = tpctl(*INSTALL, "--vnet", "br0:10.1.0.0/16", "--vnet", "br0:10.2.0.0/16", check=False)
    assert failed.returncode == 2
    assert "br0" in failed.stderr


def test_16_the_log_rule_sees_connections_in_insert_mode(lab: Lab, variant: str) -> None:
    plane(lab)
    flags = ["--iptables-logs", "--redirect-inbound-insert-instead-of-append", "--vnet", f"docker0:{CONTAINERS}"]
    with installed(lab, "--iptables-mode", variant, *flags):
        assert ask(lab, lab.layout.arriving(REMOTE, HOST_ADDRESS[Family.IPV4], "tcp", 8080)) == f"{HOST}:15006"
        with lab.inside(HOST):
            saved = run([f"iptables-{variant}-save", "-c", "-t", "nat"]).stdout
    (counter,) = [line.split("]")[0] for line in saved.splitlines() if "-A TPCTL_LOG_PREROUTING" in line]
    assert not counter.startswith("[0:")


def test_17_self_calls_honour_inbound_off_and_its_exclusions(lab: Lab, variant: str) -> None:
    plane(lab)
    own = HOST_ADDRESS[Family.IPV4]
    with installed(lab, "--iptables-mode", variant, "--redirect-inbound=false"):
        assert ask(lab, outbound(lab, own, 8080, PROXY)) == f"{HOST}:8080"
    with installed(lab, "--iptables-mode", variant, "--exclude-inbound-ports", "8080"):
        assert ask(lab, outbound(lab, own, 8080, PROXY)) == f"{HOST}:8080"
        assert ask(lab, outbound(lab, own, 8082, PROXY)) == f"{HOST}:15006"


def test_18_an_exclusion_does_not_switch_other_softwares_rules_off(lab: Lab, variant: str) -> None:
    plane(lab)
    lab.listen(HOST, Protocol.TCP, 7000)
    with lab.inside(HOST):
        rule = ["-d", str(REMOTE), "-p", "tcp", "-j", "REDIRECT", "--to-ports", "7000"]
        run([f"iptables-{variant}", "-t", "nat", "-A", "OUTPUT", *rule])
    with installed(
        lab,
        "--iptables-mode",
        variant,
        "--exclude-outbound-ips",
        str(REMOTE),
        "--redirect-outbound-insert-instead-of-append",
    ):
        assert str(lab.dial(outbound(lab, REMOTE, 8080))) == f"{HOST}:7000"


def test_19_without_comments_a_second_install_and_an_uninstall_work(lab: Lab, variant: str) -> None:
    mode = ["--iptables-mode", variant]
    tool = f"iptables-{variant}"
    with lab.inside(HOST):
        run(
            [
                tool,
                "-t",
                "nat",
                "-A",
                "OUTPUT",
                "-m",
                "comment",
                "--comment",
                "beside KUMA_MESH_OUTBOUND",
                "-j",
                "RETURN",
            ]
        )
        before = snapshot(counters=False)
        tpctl(*INSTALL, *mode, "--disable-comments")
        assert "tpctl/" not in run([f"{tool}-save"]).stdout
        tpctl(*INSTALL, *mode, "--disable-comments", "--redirect-inbound-port", "16006")
        saved = run([f"{tool}-save"]).stdout
        assert saved.count("-j TPCTL_OUTBOUND\n") == 1
        assert tpctl("status", "--json", check=False).stdout.count('"drift": []') == 1
        tpctl("uninstall")
        assert snapshot(counters=False)["nft"] == before["nft"]
        assert snapshot(counters=False)[f"{tool}-save"].strip() == before[f"{tool}-save"].strip()


@pytest.mark.parametrize("rules", [KUMA_RULES, KUMA_RULES_WITHOUT_COMMENTS])
def test_19_kumactls_rules_are_replaced_and_what_cannot_be_told_is_named(lab: Lab, variant: str, rules: str) -> None:
    with lab.inside(HOST):
        run([f"iptables-{variant}-restore", "--noflush"], stdin=rules)
        done = tpctl(*INSTALL, "--iptables-mode", variant)
        saved = run([f"iptables-{variant}-save", "-t", "nat"]).stdout
        assert "KUMA_MESH" not in saved
        assert "kuma/mesh" not in saved
        assert "kumactl" in done.stdout
        if "--comment" not in rules:
            assert "--dport 53" in saved
            assert "was installed without comments" in done.stderr
        tpctl("uninstall")


def test_20_uninstall_needs_no_user_and_clears_both_variants(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with lab.inside(HOST):
        for tool in ("iptables", "ip6tables"):
            for variant in ("nft", "legacy"):
                run([f"{tool}-{variant}", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "RETURN"])
        before = snapshot(counters=False)
        tpctl(*INSTALL, "--iptables-mode", "legacy")
        legacy = run(["iptables-legacy-save"]).stdout
        run(["iptables-nft-restore", "--noflush"], stdin=KUMA_RULES)
        ours = "".join(f"{line}\n" for line in legacy.splitlines() if "TPCTL" in line or line in ("*nat", "COMMIT"))
        run(["iptables-nft-restore", "--noflush"], stdin=ours)
        tpctl("uninstall")
        assert snapshot(counters=False) == before
        assert list(tmp_path.iterdir()) == []
        assert "nothing to do" in tpctl("uninstall").stdout


def test_21_dry_run_has_no_side_effect(lab: Lab, variant: str) -> None:
    names = [Path("/proc/net/ip_tables_names"), Path("/proc/net/ip6_tables_names")]
    with lab.inside(HOST):
        before = (snapshot(counters=True), [path.read_text() for path in names], run(["ip", "-6", "route"]).stdout)
        text = tpctl(*INSTALL, "--iptables-mode", variant, "--dry-run", "--drop-invalid-packets").stdout
        after = (snapshot(counters=True), [path.read_text() for path in names], run(["ip", "-6", "route"]).stdout)
    assert "### IPv4 ###" in text
    assert "### IPv6 ###" in text
    assert after == before


def test_21_the_dry_run_is_what_iptables_restore_accepts(lab: Lab) -> None:
    with lab.inside(HOST):
        text = tpctl(*INSTALL, "--dry-run", "--drop-invalid-packets", "--iptables-logs").stdout
        parts = text.split("### IPv6 ###\n")
        run(["iptables-restore", "--test", "--noflush"], stdin=parts[0].replace("### IPv4 ###\n", ""))
        run(["ip6tables-restore", "--test", "--noflush"], stdin=parts[1])


def test_22_a_held_lock_is_reported_within_the_time_allowed(lab: Lab) -> None:
    flags = ["--iptables-mode", "legacy", "--wait", "1", "--max-retries", "1", "--sleep-between-retries", "100ms"]
    with lab.inside(HOST), Path("/run/xtables.lock").open("a") as held:
        before = snapshot(counters=False)
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        failed = tpctl(*INSTALL, *flags, check=False)
        took = time.monotonic() - started
        fcntl.flock(held, fcntl.LOCK_UN)
        assert snapshot(counters=False) == before
    assert failed.returncode == 1
    assert "/run/xtables.lock" in failed.stderr
    assert took < 30, "with its defaults it would be 33 s"


def test_23_uninstall_leaves_resolv_conf_alone(lab: Lab) -> None:
    file = Path("/etc/resolv.conf")
    before = (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns)
    with installed(lab):
        pass
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns) == before


def test_24_auto_follows_the_hosts_own_command_whatever_rules_exist(lab: Lab) -> None:
    with lab.inside(HOST):
        own = "nft" if "nf_tables" in run(["iptables", "--version"]).stdout else "legacy"
        other = "legacy" if own == "nft" else "nft"
        run([f"iptables-{other}", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "RETURN"])
        done = tpctl(*INSTALL)
        assert f"({own})" in done.stdout
        assert f"iptables-{other} holds rules" in done.stderr
        tpctl(*INSTALL, "--iptables-mode", other)
        assert "TPCTL" not in run([f"iptables-{own}-save"]).stdout
        tpctl("uninstall")
        for variant in (own, other):
            assert "TPCTL" not in run([f"iptables-{variant}-save"]).stdout


def test_o2_the_data_plane_reaches_the_application_from_the_passthrough_address(lab: Lab, variant: str) -> None:
    plane(lab)
    for source, own in (("127.0.0.6", HOST_ADDRESS[Family.IPV4]), ("::6", HOST_ADDRESS[Family.IPV6])):
        with installed(lab, "--iptables-mode", variant):
            connection = dataclasses.replace(outbound(lab, own, 8080, PROXY), source=ip_address(source))
            lab.serve(connection)
            answer: Answer = lab.dial(connection)
        assert str(answer) == f"{HOST}:8080"
        assert str(answer.source) == source
