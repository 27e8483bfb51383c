"""A host on which `tpctl check` sends its probes, and what it may leave behind there."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.lab import run, tpctl
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import RELAY_USER, Net
from tpctl.cli.options import probing

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables-nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables-legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
    "tproxy": ("--engine", "nftables", "--inbound-mode", "tproxy"),
}
INSTALL = ("install", "--kuma-dp-user", RELAY_USER, "--redirect-all-dns-traffic")
KINDS = ("outbound TCP", "inbound TCP", "self-call TCP", "DNS UDP")
COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")


@pytest.fixture
def net() -> Iterator[Net]:
    """A host with an uplink and default routes, so that a packet that goes astray has somewhere to go."""
    with relay_net.network(redirect=False, passthrough6=False) as made:
        for family, router in (("-4", relay_net.PEER4), ("-6", relay_net.PEER6)):
            made.on_host("ip", family, "route", "add", "default", "via", router)
        yield made


@pytest.fixture
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes are on, as by default."""
    monkeypatch.delenv(probing.VARIABLE)


def checked() -> tuple[dict[str, str], dict[str, Any]]:
    """The fates by the probes' names, and the whole document."""
    done = tpctl("check", "--json", check=False)
    document = json.loads(done.stdout)
    fates = {probe["name"]: probe["fate"] for probe in document["probes"]}
    assert done.returncode == (0 if set(fates.values()) <= {"arrived"} else 3), done.stderr
    return fates, document


def devices() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith("tpctl-")]


def everything() -> dict[str, str]:
    """What a check may leave behind."""
    shown = {
        what: run(["ip", *what.split()]).stdout
        for what in ("-o address", "route show table all", "-6 route show table all", "rule", "-6 rule")
    }
    shown["sockets"] = run(["ss", "-Htan", "state", "all", "exclude", "listening"]).stdout
    return shown


def at_rest() -> dict[str, str]:
    """The same, once the data plane has closed what earlier probes have left it, which it does when it gets to it."""
    relay_net.until(lambda: not everything()["sockets"])
    return everything()


def begun() -> tuple[subprocess.Popen[bytes], int]:
    """A `tpctl check` under way, and its child, which sends."""
    command = subprocess.Popen([sys.executable, "-m", "tpctl.cli.main", "check"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    found: list[int] = []

    def has_begun() -> bool:
        found.extend(map(int, children.read_text().split()))
        return bool(found)

    relay_net.until(has_begun)
    return command, found[0]


def tracked() -> int:
    return int(COUNT.read_text()) if COUNT.exists() else 0


@contextlib.contextmanager
def capture(interface: str) -> Iterator[list[bytes]]:
    """The TCP and UDP packets that pass the interface meanwhile."""
    found: list[bytes] = []
    with relay_net.hearing(interface, socket.SOCK_DGRAM) as tap:
        tap.setblocking(False)
        yield found
        with contextlib.suppress(BlockingIOError):
            while packet := tap.recv(256):
                protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
                if protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                    found.append(packet)
