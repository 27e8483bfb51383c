"""`tpctl install` up to the point where the kernel would be touched; tests/netns has the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.commands.conftest import Run
from tpctl.change import lifecycle
from tpctl.change.lifecycle import InstallReport
from tpctl.config.load import load
from tpctl.config.options import OPTIONS
from tpctl.engines import preview
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import DnsCapture, Family, Policy, PortRange
from tpctl.system.errors import ApplyError

USER = ["--kuma-dp-user", "nobody"]


class Recorder:
    """Stands where the kernel is changed, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Policy, EngineOptions]] = []
        self.error: Exception | None = None

    def install(
        self,
        policy: Policy,
        options: EngineOptions,
        *,
        inputs: Mapping[str, Any] | None = None,
        confirm_within: float | None = None,
    ) -> InstallReport:
        self.asked.append((policy, options))
        if self.error:
            raise self.error
        families = tuple(sorted(int(family) for family in policy.families))
        return InstallReport("iptables", "nft", "the host's own", families, policy, ("kumactl's rules",), ("said",))

    @property
    def policy(self) -> Policy:
        """The policy of the last install."""
        return self.asked[-1][0]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(lifecycle, "install", recorder.install)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return recorder


def test_flags_become_a_policy(tpctl: Run, kernel: Recorder) -> None:
    code, out, _ = tpctl("install", *USER, "--exclude-inbound-ports", "22,80-90", "--redirect-inbound-port=1")
    assert code == 0
    assert kernel.policy.inbound.exclude_ports == (PortRange(22), PortRange(80, 90))
    assert kernel.policy.inbound.port == 1
    assert "by iptables (nft)" in out
    assert "except ports 22, 80-90" in out
    assert "kumactl's rules" in out
    assert "tpctl status" in out
    assert "tpctl uninstall" in out


@pytest.mark.parametrize(
    ("argv", "enabled"),
    [
        ((), True),
        (("--redirect-inbound",), True),
        (("--redirect-inbound=false",), False),
        (("--redirect-inbound=F",), False),
        (("--redirect-inbound=1",), True),
        (("--redirect-inbound=false", "--redirect-inbound"), True),
        (("--redirect-inbound", "--redirect-inbound=0"), False),
    ],
)
def test_the_go_spelling_of_truth_values(tpctl: Run, kernel: Recorder, argv: tuple[str, ...], enabled: bool) -> None:
    assert tpctl("install", *USER, *argv)[0] == 0
    assert kernel.policy.inbound.enabled is enabled


@pytest.mark.parametrize(
    "argv",
    [
        ("transparent-proxy", "--redirect-all-dns-traffic=true"),
        ("--redirect-all-dns-traffic", "transparent-proxy"),
        ("transparent-proxy", "--redirect-all-dns-traffic"),
    ],
)
def test_kumactls_word_and_a_flag_that_never_takes_it(tpctl: Run, kernel: Recorder, argv: tuple[str, ...]) -> None:
    assert tpctl("install", *USER, "--resolv-conf", os.devnull, *argv)[0] == 0
    assert kernel.policy.dns.capture is DnsCapture.ALL


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("transparent-prox",), '"transparent-prox" is not expected here'),
        (("--redirect-dns", "false"), "as in --redirect-dns=false"),
        (("--redirect-dns=maybe",), '"maybe" is neither true nor false'),
        (("--kuma-dp-user", "no-such-user"), 'there is no user "no-such-user"'),
        (("--redirect-inbound-port", "0"), '"0" is not a port'),
        (("--redirect-inbound-port", "65536"), '"65536" is not a port'),
        (("--redirect-inbound-port", "8o"), '"8o" is not a port'),
        (("--exclude-inbound-ports", "90-80"), "reversed"),
        (("--vnet", "docker0:172.17.0.1"), "has no length"),
        (("--exclude-outbound-ips", "::ffff:10.0.0.1"), "write 10.0.0.1"),
        (("--vnet", "a:10.0.0.0/8", "--vnet", "a:10.0.0.0/9"), "given twice"),
        (("--config", "/nonexistent.yaml"), "No such file"),
        (("--cgroup", ""), 'flag --cgroup: "" names no cgroup'),
        (("--dataplane-file", " "), 'flag --dataplane-file: "" names no file'),
        (("--sleep-between-retries", "9" * 400 + "h"), "is longer than 292 years"),
        (("--sleep-between-retries", "9223372036854775808"), "is not a duration"),
        (("--config", ""), 'flag --config: "" is not the path of a file'),
        (("--redirect-dns", "--redirect-all-dns-traffic"), "exclude each other"),
        (("--redirect-inbound-port", "15001"), "both are port 15001"),
        (("--redirect-dns", "--resolv-conf", os.devnull), "/dev/null cannot be read: it is a device, not a file"),
        (("--exclude-outbound-ports-for-uids", "udp:53:app"), "is not a uid"),
        (("--no-such-flag",), "No such option"),
        (("--engine", "ebpf-maybe"), "is not one of auto, nftables, iptables, ebpf"),
    ],
)
def test_bad_input_changes_nothing(tpctl: Run, kernel: Recorder, argv: tuple[str, ...], problem: str) -> None:
    user = () if "--kuma-dp-user" in argv else USER
    code, out, err = tpctl("install", *user, *argv)
    assert code == 2
    assert problem in err
    assert out == ""
    assert kernel.asked == []


def test_all_problems_in_one_go(tpctl: Run, kernel: Recorder) -> None:
    _, _, err = tpctl("install", "--wait", "x", "--redirect-dns-port=0", "--vnet", "y", "--config", "/none")
    assert len(err.splitlines()) == 4
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_warned_and_ignored(tpctl: Run, kernel: Recorder) -> None:
    code, _, err = tpctl("install", *USER, "--exclude-inbound-ports", "22", "--include-inbound-ports", "80")
    assert code == 0
    assert "warning: flag --exclude-inbound-ports is ignored" in err


def test_root_is_asked_for_after_the_configuration_was_checked(tpctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, _, err = tpctl("install", *USER)
    assert (code, "needs root" in err) == (2, True)
    code, _, err = tpctl("install", *USER, "--wait", "x")
    assert (code, "needs root" in err) == (2, False)


def test_a_failed_apply_is_exit_1(tpctl: Run, kernel: Recorder) -> None:
    kernel.error = ApplyError("refused; rolled back")
    code, out, err = tpctl("install", *USER)
    assert (code, out) == (1, "")
    assert "error: refused; rolled back" in err


def test_json(tpctl: Run, kernel: Recorder) -> None:
    code, out, err = tpctl("install", *USER, "--json", "--exclude-outbound-ips", "10.0.0.1/8")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["installed"], data["engine"], data["variant"]) == (True, "iptables", "nft")
    assert data["policy"]["outbound"]["excludeDestinations"] == ["10.0.0.0/8"]
    assert "said" in data["notices"]
    assert any("host bits" in notice for notice in data["notices"])


def test_verbose_names_what_was_given(tpctl: Run, kernel: Recorder) -> None:
    _, _, err = tpctl("install", *USER, "--verbose")
    assert "note: kumaDPUser is nobody, by flag --kuma-dp-user" in err
    assert kernel.asked[0][1].verbose


def test_dry_run_prints_the_plan_and_touches_nothing(tpctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, out, _ = tpctl("install", *USER, "--engine", "iptables", "--dry-run", "--exclude-inbound-ports", "22")
    assert code == 0
    assert "*nat" in out
    assert "--dport 22" in out
    code, out, _ = tpctl("install", *USER, "--engine", "iptables", "--dry-run", "--json")
    assert (code, json.loads(out)["dryRun"], "*nat" in json.loads(out)["text"]) == (0, True, True)


def test_dry_run_by_variable(tpctl: Run, kernel: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "ruleset", lambda policy, options: "the plan")
    monkeypatch.setenv("KUMA_TRANSPARENT_PROXY_DRY_RUN", "true")
    assert tpctl("install", *USER)[:2] == (0, "the plan\n")
    assert kernel.asked == []


def test_print_config_can_be_given_back(tpctl: Run, tmp_path: Path) -> None:
    flags = [
        "--redirect-dns", "--exclude-inbound-ports=22,80-90", "--exclude-outbound-ips", "10.0.0.0/8,fd00::/8",
        "--exclude-outbound-ports-for-uids", "tcp:22,80-90:1-2", "--vnet", "br+:fd00::/64", "--ip-family-mode=ipv4",
        "--sleep-between-retries", "1500ms", "--iptables-executables", "iptables:/a", "--kuma-dp-user", "a: #b",
    ]  # fmt: skip
    code, out, _ = tpctl("install", "--print-config", *flags)
    assert code == 0
    assert "# flag --redirect-dns" in out
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    printed = load(files=[str(path)])
    data = json.loads(tpctl("install", "--print-config", "--json", *flags)[1])["config"]
    assert data["redirect.inbound.excludePorts"] == {
        "value": [22, "80-90"],
        "origin": "flag --exclude-inbound-ports",
    }
    assert (printed.proxy_user, printed.sleep_between_retries, printed.executables) == (
        "a: #b",
        1.5,
        {"iptables": "/a"},
    )
    again = tpctl("install", "--print-config", "--json", "--config", str(path))[1]
    assert {key: row["value"] for key, row in json.loads(again)["config"].items()} == {
        key: row["value"] for key, row in data.items()
    }


def test_help_has_every_flag_in_its_section_and_an_example(tpctl: Run) -> None:
    code, out, _ = tpctl("install", "--help")
    assert code == 0
    for option in OPTIONS:
        section = out[out.index(f"\n{option.section}:") :]
        assert f"{option.flag}" in section
    assert "tpctl install --kuma-dp-user kuma-dp" in out[out.index("Examples:") :]


def test_the_module_starts_quickly() -> None:
    """What a user waits for is mostly imports."""
    ours = ("tpctl.spec.decide", "tpctl.change.lifecycle")
    heavy = ("yaml", "pyroute2", "structlog", "iptc", "subprocess", "json", *ours)
    code = f"import sys, tpctl.cli.commands.install; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_defect_13_the_family_mode_in_any_case(tpctl: Run, kernel: Recorder) -> None:
    tpctl("install", *USER, "--ip-family-mode", "IPv4")
    assert kernel.policy.families == {Family.IPV4}
