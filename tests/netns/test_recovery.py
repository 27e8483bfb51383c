"""The commands of docs/operations.md for a host on which tpctl is gone, run as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.lab import PROXY_USER, bare_namespace, run, snapshot, tpctl
from tpctl.engines import direct
from tpctl.persist import direct_xml, neighbours, systemd, watch
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Policy

pytestmark = pytest.mark.root

FLAGS = {
    "nftables": ("--engine", "nftables"),
    "nft": ("--iptables-mode", "nft"),
    "legacy": ("--iptables-mode", "legacy"),
}
BLOCK = re.compile(r"<!-- recover: (\w+) -->\n```sh\n(.*?)```", re.DOTALL)
BLOCKS = dict(BLOCK.findall((ROOT_DIRECTORY / "docs" / "operations.md").read_text()))


@pytest.mark.parametrize("engine", list(FLAGS))
@pytest.mark.needs("legacy")
def test_by_hand(engine: str) -> None:
    with bare_namespace() as space, space.inside():
        for tool in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
            # Somebody else's rules; and tables that exist, for those of iptables-nft do not go by hand.
            nat = ("nat", "OUTPUT"), ("nat", "PREROUTING")
            for table, chain in (*nat, ("raw", "OUTPUT"), ("mangle", "PREROUTING"), ("filter", "INPUT")):
                run([tool, "-t", table, "-A", chain, "-p", "udp", "--dport", "9", "-j", "ACCEPT"])
        before = snapshot(counters=False)
        tpctl("install", "--kuma-dp-user", PROXY_USER, "--redirect-all-dns-traffic", "--drop-invalid-packets",
              *FLAGS[engine])  # fmt: skip
        assert snapshot(counters=False) != before
        subprocess.run(["sh", "-ec", BLOCKS[engine]], check=True, capture_output=True)
        after = snapshot(counters=False)
        tpctl("uninstall")
    assert "tpctl" not in str(after).lower()
    if engine == "nft":  # the restore makes the tables anew, so nft lists them in another order
        del before["nft"], after["nft"]
    for held in (before, after):  # chains of nat that nobody used before stay behind, empty
        for name in held:
            held[name] = re.sub(r"^:[A-Z]+ ACCEPT.*\n", "", held[name], flags=re.MULTILINE)
    assert after == before


def test_what_brings_answers_back_goes_by_hand() -> None:
    def routing() -> str:
        tables = ("rule", "-6 rule", "route show table all", "-6 route show table all")
        return "".join(run(["ip", *words.split()]).stdout for words in tables)

    with bare_namespace() as space, space.inside():
        run(["ip", "rule", "add", "pref", "1507", "fwmark", "7", "lookup", "main"])  # somebody else's
        before = routing()
        tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "nftables", "--inbound-mode", "tproxy")
        assert "proto 158" in routing()
        run(["nft", "add", "table", "inet", "tpctl_answers"])  # as if connections had outlived the mode
        script = BLOCKS["nftables"] + BLOCKS["tproxy"] + BLOCKS["routes"]
        subprocess.run(["sh", "-ec", script], check=True, capture_output=True)
        after, tables = routing(), run(["nft", "list", "tables"]).stdout
        tpctl("uninstall")
    assert after == before
    assert "tpctl" not in tables


def test_every_unit_is_removed_by_hand() -> None:
    text = (ROOT_DIRECTORY / "docs" / "operations.md").read_text()
    (block,) = re.findall(r"```sh\n(systemctl disable tpctl.*?)```", text, re.DOTALL)
    units = (systemd.SERVICE, systemd.RELAY, systemd.RELAY_SOCKET, systemd.DROP_IN, *watch.UNITS, neighbours.SERVICE)
    for unit in units:
        assert f"/etc/systemd/system/{unit}" in block


@pytest.mark.skipif(not shutil.which("firewall-offline-cmd"), reason="no firewalld here")
def test_direct_xml_by_hand(tmp_path: Path) -> None:
    content = (
        b'<?xml version="1.0" encoding="utf-8"?>\n<direct>\n  <chain ipv="ipv4" table="nat" chain="SITE"/>\n'
        b'  <rule ipv="ipv4" table="nat" chain="SITE" priority="0">-j RETURN</rule>\n</direct>\n'
    )
    rules = direct.of_policy(Policy(5678, dns=Dns(DnsCapture.ALL), drop_invalid=True), EngineOptions())
    file = tmp_path / "direct.xml"
    file.write_bytes(direct_xml.with_rules(content, rules))
    (command,) = [line for line in BLOCKS["firewalld"].splitlines() if line.startswith("sed")]
    subprocess.run(["sh", "-ec", command.replace("/etc/firewalld/direct.xml", str(file))], check=True)
    assert file.read_bytes() == content
