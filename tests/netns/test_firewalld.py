"""--store-firewalld beside a real firewalld, with both of its backends: one copy of each rule, whatever it does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.netns.firewall import Firewall, firewall
from tests.netns.lab import PROXY, PROXY_USER
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout
from tpctl.spec.policy import Policy

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which("firewalld") or not shutil.which("dbus-daemon"), reason="no firewalld here"),
]

STORE = ("install", "--kuma-dp-user", PROXY_USER, "--store-firewalld")
RICH = ("--redirect-all-dns-traffic", "--redirect-inbound-insert-instead-of-append", "--drop-invalid-packets",
        "--vnet", "docker+:172.17.0.0/16", "--exclude-interfaces", "docker9,wg+",
        "--exclude-outbound-marks", "0x80000/0xff0000")  # fmt: skip
OTHERS = """\
<?xml version="1.0" encoding="utf-8"?>
<!-- the site's own -->
<direct>
  <chain ipv="ipv4" table="nat" chain="SITE"/>
  <rule priority="0" table="nat" ipv="ipv4" chain="PREROUTING">-p tcp --dport 4 -j SITE</rule>
</direct>
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        made.serve_data_plane(Policy(PROXY))
        yield made


@pytest.fixture(params=["nftables", "iptables"])
def daemon(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[Firewall]:
    with firewall(tmp_path, str(request.param), lab.spaces[HOST]) as made:
        # Its default zone would refuse what the data plane is to take.
        made.run(["firewall-cmd", "--permanent", "--zone=public", "--set-target=ACCEPT"])
        made.run(["firewall-cmd", "--reload"])
        yield made


def rules(daemon: Firewall) -> list[str]:
    """Everything of ours in either family, sorted; firewalld's chains for direct rules count as the built-in ones."""
    saved = "".join(daemon.run([f"{tool}-save"]).stdout for tool in ("iptables", "ip6tables"))
    ours = [line for line in saved.splitlines() if "TPCTL_" in line and line[0] in "-:"]
    return sorted(re.sub(r"\[\d+:\d+\]|_direct\b", "", line) for line in ours)


def inbound(lab: Lab, port: int = 8080) -> str:
    connection = lab.layout.arriving(ip_address("203.0.113.7"), next(iter(HOST_ADDRESS.values())), "tcp", port)
    lab.serve(connection)
    return str(lab.dial(connection))


@pytest.mark.parametrize("flags", [(), RICH])
def test_exactly_one_copy_of_each_rule_whatever_firewalld_does(
    lab: Lab, daemon: Firewall, flags: tuple[str, ...]
) -> None:
    daemon.direct.write_text(OTHERS)
    daemon.direct.chmod(0o600)
    daemon.tpctl(*STORE, *flags)
    wanted = rules(daemon)
    assert wanted
    assert inbound(lab) == "host:15006"
    for action in ("--reload", "--complete-reload", "--reload"):
        daemon.run(["firewall-cmd", action])
        assert rules(daemon) == wanted, f"{action}\n{daemon.log}"
        assert inbound(lab) == "host:15006"
    daemon.restart()
    assert rules(daemon) == wanted, daemon.log
    assert inbound(lab) == "host:15006"
    assert json.loads(daemon.tpctl("status", "--json", check=False).stdout)["drift"] == []
    assert "unchanged" in daemon.tpctl(*STORE, *flags).stdout
    assert daemon.direct.stat().st_mode & 0o777 == 0o600
    daemon.tpctl("uninstall")
    assert rules(daemon) == []
    assert daemon.direct.read_text() == OTHERS
    daemon.run(["firewall-cmd", "--reload"])
    assert rules(daemon) == []
    assert "SITE" in daemon.run(["iptables-save"]).stdout
    assert inbound(lab) == "host:8080"


def test_reload_at_once(lab: Lab, daemon: Firewall) -> None:
    daemon.tpctl(*STORE, "--firewalld-reload")
    assert inbound(lab) == "host:15006"
    wanted = rules(daemon)
    daemon.run(["firewall-cmd", "--reload"])
    assert rules(daemon) == wanted
    daemon.tpctl(*STORE, "--firewalld-reload", "--exclude-inbound-ports", "8080")
    assert inbound(lab) == "host:8080"
    daemon.tpctl("uninstall")
    assert not daemon.direct.exists()


def test_an_install_without_the_flag_takes_the_entries_out(daemon: Firewall) -> None:
    daemon.tpctl(*STORE)
    assert daemon.direct.exists()
    daemon.tpctl("install", "--kuma-dp-user", PROXY_USER)
    assert not daemon.direct.exists()
    daemon.tpctl("uninstall")


def test_the_nftables_engine_survives_by_itself(lab: Lab, daemon: Firewall) -> None:
    daemon.tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "nftables")
    for action in ("--reload", "--complete-reload"):
        daemon.run(["firewall-cmd", action])
        assert inbound(lab) == "host:15006"
    daemon.restart()
    assert inbound(lab) == "host:15006"
    assert json.loads(daemon.tpctl("status", "--json", check=False).stdout)["drift"] == []
    daemon.tpctl("uninstall")


@pytest.mark.parametrize("daemon", ["nftables"], indirect=True)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<direct><rule", "firewalld.direct(5)"),
        ('<direct><rule ipv="ipv4" table="x" chain="y" priority="z">-j A</rule></direct>', "firewalld refuses"),
    ],
)
def test_a_file_that_firewalld_would_refuse_is_never_written(daemon: Firewall, content: str, said: str) -> None:
    daemon.direct.write_text(content)
    refused = daemon.tpctl(*STORE, check=False)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert rules(daemon) == []
    assert daemon.direct.read_text() == content
    assert [one.name for one in daemon.configuration.iterdir() if one.name.startswith(".")] == []


@pytest.mark.parametrize("daemon", ["nftables"], indirect=True)
def test_persist_firewalld_stores_what_is_installed(lab: Lab, daemon: Firewall) -> None:
    daemon.tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "nftables")
    refused = daemon.tpctl("persist", "--firewalld", check=False)
    assert refused.returncode == 2
    assert "persist --systemd" in refused.stderr
    daemon.tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables")
    assert "stored the rules" in daemon.tpctl("persist", "--firewalld").stdout
    wanted = rules(daemon)
    daemon.run(["firewall-cmd", "--reload"])
    assert rules(daemon) == wanted
    assert inbound(lab) == "host:15006"
    daemon.tpctl("uninstall")
    assert not daemon.direct.exists()


@pytest.mark.parametrize("daemon", ["nftables"], indirect=True)
def test_an_unconfirmed_install_leaves_direct_xml_as_it_was(daemon: Firewall) -> None:
    daemon.direct.write_text(OTHERS)
    daemon.tpctl(*STORE, "--confirm-within", "60s")
    assert "TPCTL_" in daemon.direct.read_text()
    daemon.tpctl("rollback")
    assert daemon.direct.read_text() == OTHERS
    assert rules(daemon) == []
