"""Every command's JSON is what docs/schemas/output.json says: `tests.netns.lab.tpctl` validates it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.netns.lab import PROXY_USER, run, tpctl
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout

pytestmark = pytest.mark.root
POLICY = ("--kuma-dp-user", PROXY_USER)


def told(*words: str, code: int = 0) -> str:
    """The kind of the document that a command prints."""
    done = tpctl(*words, "--json", check=False)
    assert done.returncode == code, done.stderr
    return str(json.loads(done.stdout)["kind"])


def test_every_command() -> None:
    with Lab(Layout()) as lab, lab.inside(HOST):
        assert told("status") == "Status"
        assert told("check") == "Check"
        assert told("apply", code=2) == "Error"
        assert told("install", *POLICY, "--dry-run") == "DryRun"
        assert told("install", *POLICY, "--print-config") == "Configuration"
        full = ("--exclude-outbound-ports-for-uids", "tcp:22:1000-1999", "--vnet", "docker0:172.17.0.0/16")
        assert told("install", *POLICY, *full, "--exclude-interfaces", "wg+") == "Install"
        assert told("status", "--probe", "--verbose", code=3) == "Status"
        assert told("check", code=3) == "Check"
        assert told("apply") == "Apply"
        assert told("verify") == "Verify"
        for words in (("outbound",), ("inbound", "--from", "203.0.113.7"), ("dns",)):
            assert told("explain", *words, "--to", "203.0.113.9:443") == "Explain"
        assert told("explain", "outbound", "--to", "localhost:80") == "Explain"
        assert told("uninstall", "--dry-run") == "Uninstall"
        assert told("install", *POLICY, "--confirm-within", "600s") == "Install"
        assert told("status", code=3) == "Status"
        assert told("confirm") == "Confirm"
        assert told("uninstall", "--confirm-within", "600s") == "Uninstall"
        assert told("rollback") == "Rollback"
        assert told("rollback", code=2) == "Error"
        assert told("persist") == "Persist"
        assert told("uninstall") == "Uninstall"
        assert told("version") == "Version"


@pytest.mark.parametrize("engine", ["nftables", "iptables"])
def test_the_same_as_metrics(engine: str) -> None:
    with Lab(Layout()) as lab, lab.inside(HOST):
        tpctl("install", *POLICY, "--engine", engine, "--no-probe")
        done = tpctl("status", "--prometheus", "--probe", check=False)
        assert done.returncode == 3  # nothing listens
        assert f'tpctl_installed{{engine="{engine}",variant=' in done.stdout
        assert 'tpctl_listener_up{role="outbound",protocol="tcp",port="15001"} 0' in done.stdout
        probe = 'kind="outbound",direction="outbound",family="ipv4",protocol="tcp",fate="refused"'
        assert f"tpctl_probe_fate{{{probe}}} 1" in done.stdout
        after = tpctl("status", "--prometheus", check=False).stdout  # what the probes have moved
        assert re.search(r'tpctl_rule_packets_total{[^}]*rule="o7"} [1-9]', after)
        if shutil.which("promtool"):
            assert run(["promtool", "check", "metrics"], stdin=done.stdout).stderr == ""
        tpctl("uninstall")


def test_a_picture(tmp_path: Path) -> None:
    with Lab(Layout()) as lab, lab.inside(HOST):
        assert "nothing is installed" in tpctl("show", check=False).stderr
        tpctl("install", *POLICY, "--no-probe", "--exclude-inbound-ports", "22")
        shown = tpctl("show").stdout
        assert shown.startswith("tpctl on this host: IPv4 and IPv6 by ")
        assert "2 problems" in shown.splitlines()[0]
        assert "client --> [PREROUTING] --> [port 15006]" in shown
        assert "inbound: nobody listens" in shown
        assert "flowchart LR" in tpctl("show", "--mermaid").stdout
        drawing = tmp_path / "picture.svg"
        assert tpctl("show", "--svg", str(drawing)).stdout == f"wrote {drawing}\n"
        assert tpctl("show", "--svg", "-").stdout == drawing.read_text()
        assert tpctl("show", "--svg", f"{tmp_path}/none/x.svg", check=False).returncode == 2
        assert tpctl("show", "--svg", "-", "--mermaid", check=False).returncode == 2
        tpctl("uninstall")
