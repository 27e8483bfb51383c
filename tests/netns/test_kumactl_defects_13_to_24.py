"""The known defects of kumactl, by their numbers in docs/kumactl.md, 13 to 24: input, order, uninstall and locks."""

from __future__ import annotations

import dataclasses
import fcntl
import stat
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.netns import kumactl_host
from tests.netns.kumactl_host import (
    CONTAINERS,
    INSTALL,
    KUMA_RULES,
    KUMA_RULES_WITHOUT_COMMENTS,
    REMOTE,
    ask,
    outbound,
    plane,
)
from tests.netns.lab import PROXY, installed, run, snapshot, tpctl
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER
from tpctl.rehearsal.sockets import Answer
from tpctl.spec.policy import Family, Protocol

pytestmark = pytest.mark.root

lab = kumactl_host.lab


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
    assert "--to-destination :16006" in rules
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
        for table in ("filter", "mangle"):  # of the legacy variant, which have no end
            run([tool, "-t", table, "-S"])
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


@pytest.mark.needs("legacy")
def test_20_uninstall_needs_no_user_and_clears_both_variants(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with lab.inside(HOST):
        for tool in ("iptables", "ip6tables"):
            for variant in ("nft", "legacy"):
                run([f"{tool}-{variant}", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "RETURN"])
            for table in ("filter", "mangle"):  # which have no end
                run([f"{tool}-legacy", "-t", table, "-S"])
        before = snapshot(counters=False)
        tpctl(*INSTALL, "--iptables-mode", "legacy")
        legacy = run(["iptables-legacy-save", "-t", "nat"]).stdout
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
        before = (
            snapshot(counters=True, policies=False),
            [path.read_text() for path in names],
            run(["ip", "-6", "route"]).stdout,
        )
        text = tpctl(*INSTALL, "--iptables-mode", variant, "--dry-run", "--drop-invalid-packets").stdout
        after = (
            snapshot(counters=True, policies=False),
            [path.read_text() for path in names],
            run(["ip", "-6", "route"]).stdout,
        )
    assert "### IPv4 ###" in text
    assert "### IPv6 ###" in text
    assert after == before


def test_21_the_dry_run_is_what_iptables_restore_accepts(lab: Lab) -> None:
    with lab.inside(HOST):
        text = tpctl(*INSTALL, "--dry-run", "--drop-invalid-packets", "--iptables-logs").stdout
        parts = text.split("### IPv6 ###\n")
        run(["iptables-restore", "--test", "--noflush"], stdin=parts[0].replace("### IPv4 ###\n", ""))
        run(["ip6tables-restore", "--test", "--noflush"], stdin=parts[1])


@pytest.mark.needs("legacy")
def test_22_a_held_lock_is_reported_within_the_time_allowed(lab: Lab) -> None:
    flags = ["--iptables-mode", "legacy", "--wait", "1", "--max-retries", "1", "--sleep-between-retries", "100ms"]
    with lab.inside(HOST), Path("/run/xtables.lock").open("a") as held:
        before = snapshot(counters=False)
        fcntl.flock(held, fcntl.LOCK_EX)
        failed = tpctl(*INSTALL, *flags, check=False)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert snapshot(counters=False) == before
    assert failed.returncode == 1
    assert "another program has held /run/xtables.lock for 1 s" in failed.stderr


def test_23_uninstall_leaves_resolv_conf_alone(lab: Lab) -> None:
    file = Path("/etc/resolv.conf")
    before = (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns)
    with installed(lab):
        pass
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns) == before


@pytest.mark.needs("legacy")
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
