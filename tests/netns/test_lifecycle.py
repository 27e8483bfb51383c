"""Install, apply, status and uninstall as an operator meets them: repeated, repaired, interrupted, on a poor host."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.lab import PROXY, PROXY_USER, run, snapshot, tpctl, tpctl_unprivileged
from tpctl import __version__
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout
from tpctl.spec.policy import Policy

pytestmark = pytest.mark.root

PATIENCE_SECONDS = 60.0
INSTALL = ("install", "--kuma-dp-user", PROXY_USER)
ENGINES = {
    "nftables": ("--engine", "nftables"),
    "nft": ("--iptables-mode", "nft"),
    "legacy": ("--iptables-mode", "legacy"),
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        made.serve_data_plane(Policy(PROXY))
        yield made


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The flags of each engine in turn."""
    return ENGINES[str(request.param)]


def status() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tpctl("status", "--json", check=False).stdout)
    return document


def inbound(lab: Lab, port: int) -> str:
    connection = lab.layout.arriving(ip_address("203.0.113.7"), next(iter(HOST_ADDRESS.values())), "tcp", port)
    lab.serve(connection)
    return str(lab.dial(connection))


def test_an_identical_install_changes_nothing_and_keeps_counters(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine)
    assert inbound(lab, 8080) == "host:15006"
    with lab.inside(HOST):
        before = snapshot(counters=True, policies=False)
        assert re.search(r"packets [1-9]|\[[1-9]\d*:", str(before))
        assert "unchanged" in tpctl(*INSTALL, *engine).stdout
        assert snapshot(counters=True, policies=False) == before
        assert "unchanged" not in tpctl(*INSTALL, *engine, "--exclude-inbound-ports", "8080").stdout
    assert inbound(lab, 8080) == "host:8080"
    with lab.inside(HOST):
        tpctl("uninstall")


def test_apply_repairs_what_somebody_removed(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine)
        assert status()["problems"] == []
        assert "nothing was changed" in tpctl("apply").stdout
        if "nftables" in engine:
            run(["nft", "flush", "table", "inet", "tpctl"])
        else:
            run([f"iptables-{engine[1]}", "-t", "nat", "-F", "PREROUTING"])
    assert inbound(lab, 8080) == "host:8080"
    with lab.inside(HOST):
        found = status()
        assert found["drift"]
        assert any("tpctl apply" in problem for problem in found["problems"])
        assert tpctl("status", check=False).returncode == 3
        assert "repaired" in tpctl("apply").stdout
        assert status()["drift"] == []
    assert inbound(lab, 8080) == "host:15006"
    with lab.inside(HOST):
        tpctl("uninstall")


def test_apply_brings_back_the_loopback_address(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL)
        run(["ip", "address", "del", "::6/128", "dev", "lo"])
        assert "repaired" in tpctl("apply").stdout
        assert "::6/128" in run(["ip", "address", "show", "dev", "lo"]).stdout
        tpctl("uninstall")


def test_apply_without_a_record_is_bad_input(lab: Lab) -> None:
    with lab.inside(HOST):
        failed = tpctl("apply", check=False)
    assert failed.returncode == 2
    assert "tpctl install" in failed.stderr


@pytest.mark.parametrize("damage", ["gone", "empty", "not JSON", "another format", "a policy that makes no sense"])
def test_uninstall_needs_no_record(lab: Lab, engine: tuple[str, ...], damage: str) -> None:
    with lab.inside(HOST):
        run(["iptables-nft", "-t", "filter", "-A", "INPUT", "-p", "udp", "-j", "ACCEPT"])
        if engine[1] == "legacy":  # a table of x_tables stays for the life of the namespace, see docs/operations
            for table in ("filter", "nat", "mangle"):
                run(["iptables-legacy-save", "-t", table])
                run(["ip6tables-legacy-save", "-t", table])
        before = snapshot(counters=False)
        tpctl(*INSTALL, *engine)
        record = state.path()
        content = {
            "empty": "",
            "not JSON": "{",
            "another format": '{"format": 99}',
            "a policy that makes no sense": '{"format": 1, "policy": {"inbound": []}}',
        }
        if damage == "gone":
            record.unlink()
        else:
            record.write_text(content[damage])
        assert any("no record" in problem for problem in status()["problems"])
        tpctl("uninstall")
        assert snapshot(counters=False) == before
        assert not record.parent.exists()


def test_an_interrupted_install_is_seen_and_healed(lab: Lab) -> None:
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL)
        record = state.path()
        record.write_text(record.read_text().replace('"installed"', '"installing"'))
        assert any("interrupted" in problem for problem in status()["problems"])
        assert "installed" in tpctl(*INSTALL).stdout
        assert status()["problems"] == []
        tpctl("uninstall")
        assert snapshot(counters=False) == before


def test_status_names_the_wrong_user(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", "games")
        problems = status()["problems"]
        tpctl("uninstall")
    assert any("runs as uid" in each and "not as the data plane user" in each for each in problems), problems


def test_two_namespaces_do_not_see_each_other(lab: Lab) -> None:
    with Lab(Layout()) as other:
        with lab.inside(HOST):
            tpctl(*INSTALL)
        with other.inside(HOST):
            assert status()["installed"] is False
            assert "nothing to do" in tpctl("uninstall").stdout
        with lab.inside(HOST):
            assert status()["installed"] is True
            tpctl("uninstall")


@pytest.mark.needs("legacy")
def test_flush_asks_shows_what_is_lost_and_empties_nat_and_raw(lab: Lab) -> None:
    with lab.inside(HOST):
        for variant in ("nft", "legacy"):
            run([f"iptables-{variant}", "-t", "nat", "-N", "FOREIGN"])
            run([f"iptables-{variant}", "-t", "nat", "-A", "OUTPUT", "-j", "FOREIGN"])
            run([f"iptables-{variant}", "-t", "mangle", "-A", "OUTPUT", "-j", "ACCEPT"])
        tpctl(*INSTALL)
        asked = subprocess.run(
            [sys.executable, "-m", "tpctl.cli.main", "uninstall", "--flush"],
            input="n\n", capture_output=True, text=True, check=False, cwd=ROOT_DIRECTORY,
        )  # fmt: skip
        assert asked.returncode == 1
        assert "-A OUTPUT -j FOREIGN" in asked.stdout
        silent = tpctl("uninstall", "--flush", "--json", check=False)
        told = json.loads(silent.stdout)
        assert (silent.returncode, told["kind"], "--yes or --dry-run" in silent.stderr) == (2, "Error", True)
        assert status()["installed"] is True
        tpctl("uninstall", "--flush", "--yes")
        for variant in ("nft", "legacy"):
            saved = run([f"iptables-{variant}-save"]).stdout
            assert "FOREIGN" not in saved
            assert "-A OUTPUT -j ACCEPT" in saved
        assert "tpctl" not in run(["nft", "list", "ruleset"]).stdout


@pytest.mark.parametrize("lost", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_lost_terminal_does_not_stop_an_install_half_way(lab: Lab, tmp_path: Path, lost: signal.Signals) -> None:
    began, told = tmp_path / "began", tmp_path / "told"
    slow = tmp_path / "restore"
    waiting = f"until test -e {told}; do sleep 0.02; done"
    slow.write_text(f'#!/bin/sh\ntouch {began}\n{waiting}\nsleep 0.1\nexec iptables-restore "$@"\n')
    slow.chmod(0o755)
    tools = f"iptables:/usr/sbin/iptables,iptables-save:/usr/sbin/iptables-save,iptables-restore:{slow}"
    with lab.inside(HOST):
        argv = [sys.executable, "-m", "tpctl.cli.main", *INSTALL, "--ip-family-mode", "ipv4"]
        process = subprocess.Popen(
            [*argv, "--iptables-executables", tools], cwd=ROOT_DIRECTORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not began.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(lost)
        told.touch()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        if lost is signal.SIGINT:  # there is nothing to stop any more, and the exit code tells what has been done
            assert (process.returncode, out.startswith("installed: IPv4"), "nothing was" in err) == (0, True, False)
        found = status()
        assert (found["phase"], found["drift"]) == ("installed", [])
        tpctl("uninstall")


def test_a_kernel_without_the_nat_table_is_bad_input(lab: Lab, tmp_path: Path) -> None:
    said = "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'"
    broken = tmp_path / "restore"
    broken.write_text(f'#!/bin/sh\ncat >/dev/null\necho "{said}" >&2\nexit 3\n')
    broken.chmod(0o755)
    tools = [
        f"{family}{tool}:/usr/sbin/{family}{tool}" for family in ("iptables", "ip6tables") for tool in ("", "-save")
    ]
    tools += [f"{family}-restore:{broken}" for family in ("iptables", "ip6tables")]
    with lab.inside(HOST):
        before = snapshot(counters=True, policies=False)
        failed = tpctl(*INSTALL, "--iptables-executables", ",".join(tools), check=False)
        assert snapshot(counters=True, policies=False) == before
    assert failed.returncode == 2
    assert "lacks a table" in failed.stderr
    assert "nat" in failed.stderr


def test_executables_that_are_no_iptables_are_bad_input(lab: Lab) -> None:
    tools = ",".join(f"{tool}:/bin/false" for tool in ("iptables", "iptables-save", "iptables-restore"))
    with lab.inside(HOST):
        failed = tpctl(*INSTALL, "--ip-family-mode", "ipv4", "--iptables-executables", tools, check=False)
    assert failed.returncode == 2
    assert "/bin/false is not iptables" in failed.stderr


HIDDEN = 'for tool in nft legacy; do mount --bind /dev/null "/usr/sbin/xtables-$tool-multi"; done; exec "$@"'


@pytest.mark.parametrize(("flags", "code"), [(("--engine", "iptables"), 2), ((), 0)])
def test_a_host_without_iptables(lab: Lab, flags: tuple[str, ...], code: int) -> None:
    with lab.inside(HOST):
        words = [sys.executable, "-m", "tpctl.cli.main", *INSTALL, *flags]
        done = run(["unshare", "--mount", "sh", "-c", HIDDEN, "sh", *words], check=False)
        tpctl("uninstall")
    assert done.returncode == code, done.stderr
    if code:
        assert "no iptables on this host" in done.stderr
    else:
        assert "by nftables" in done.stdout


@pytest.mark.parametrize("command", ["install", "uninstall", "status", "apply", "verify"])
def test_without_root_nothing_is_touched(lab: Lab, command: str) -> None:
    flags = ["--kuma-dp-user", PROXY_USER] if command in ("install", "verify") else []
    with lab.inside(HOST):
        before = snapshot(counters=True, policies=False)
        done = tpctl_unprivileged(command, *flags)
        assert snapshot(counters=True, policies=False) == before
    assert done.returncode == 2
    assert "needs root" in done.stderr


def test_without_root_a_dry_run_and_explain_work(lab: Lab) -> None:
    with lab.inside(HOST):
        planned = tpctl_unprivileged("install", "--kuma-dp-user", PROXY_USER, "--dry-run", "--engine", "iptables")
        explained = tpctl_unprivileged("explain", "outbound", "--to", "10.1.2.3:443", "--kuma-dp-user", PROXY_USER)
    assert "-j DNAT --to-destination :15006" in planned.stdout
    assert "redirect" in explained.stdout


def test_what_an_older_version_installed_is_reported_and_replaced(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine)
        record = state.path()
        record.write_text(record.read_text().replace(f'"version": "{__version__}"', '"version": "0.0.1"'))
        assert status()["version"] == "0.0.1"
        assert "what tpctl 0.0.1 installed" in tpctl(*INSTALL, *engine).stdout
        assert status()["version"] == __version__
        assert status()["problems"] == []
        assert "unchanged" in tpctl(*INSTALL, *engine).stdout
        tpctl("uninstall")


RULES = {
    "nftables": ("nft list table inet tpctl", "(echo delete table inet tpctl; cat) | nft -f -"),
    "nft": ("iptables-nft-save -t nat", "iptables-nft-restore"),
    "legacy": ("iptables-legacy-save -t nat", "iptables-legacy-restore"),
}


@pytest.mark.parametrize("made_by", list(RULES))
def test_rules_tell_which_version_made_them(lab: Lab, made_by: str) -> None:
    chosen = ("--engine", "nftables") if made_by == "nftables" else ("--iptables-mode", made_by)
    flags = (*INSTALL, *chosen, "--ip-family-mode", "ipv4")
    show, put = RULES[made_by]
    with lab.inside(HOST):
        tpctl(*flags)
        assert status()["rulesVersion"] == __version__
        run(["sh", "-ec", f"{show} | sed 's/(tpctl {__version__})/(tpctl 0.0.9)/' | ({put})"])
        assert any("tpctl 0.0.9 installed the rules" in problem for problem in status()["problems"])
        state.clear()
        assert any("rules of tpctl 0.0.9 are installed" in problem for problem in status()["problems"])
        assert "what tpctl 0.0.9 installed" in tpctl(*flags).stdout
        assert (status()["rulesVersion"], status()["problems"]) == (__version__, [])
        tpctl("uninstall")
