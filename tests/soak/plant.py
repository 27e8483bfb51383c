"""The host of the long run: the real command and the real relay, with a /run and a root of cgroup2 of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.crash.scene import FLAVOURS, PROXY_FLAGS, Host
from tests.hidden import ROOT_DIRECTORY, shown_python
from tests.netns.lab import APP, PROXY_USER
from tests.netns.relay.net import is_running
from tests.soak.traffic import Applications, Servers, Way, Window
from tpctl.rehearsal.cgroup import OwnPlace, own_place
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, Layout
from tpctl.rehearsal.namespaces import write_sysctls
from tpctl.spec.policy import Family

ENGINES = ("nftables", "iptables nft", "ebpf", "iptables legacy")
POLICIES = (
    ("--redirect-all-dns-traffic",),
    ("--redirect-all-dns-traffic", "--exclude-inbound-ports", "22", "--exclude-outbound-ports", "22,25,7001-7100"),
    ("--redirect-all-dns-traffic", "--exclude-outbound-ips", "10.1.0.0/16", "--drop-invalid-packets"),
)
"""Each redirects everything the applications do."""
REMOTES = {socket.AF_INET: "203.0.113.10", socket.AF_INET6: "2001:db8:10::10"}
COMMAND_SECONDS = 120.0
DRAIN_SECONDS = 60
"""More than a connection lasts, also on a busy machine."""
_START_SECONDS = 120.0
_FAMILIES = {socket.AF_INET: Family.IPV4, socket.AF_INET6: Family.IPV6}
_SYSCTLS = {
    "ipv4/ip_local_port_range": "10000 60000",
    "ipv4/tcp_tw_reuse": "1",
    "ipv4/tcp_fin_timeout": "5",
    # What conntrack remembers of connections that are over is to say something about those that exist.
    "netfilter/nf_conntrack_tcp_timeout_time_wait": "3",
    "netfilter/nf_conntrack_udp_timeout": "5",
    "netfilter/nf_conntrack_udp_timeout_stream": "5",
}
_RELAY = """
drain_timeout: {drain}s
timeouts: {{idle: {idle}s}}
dns: {{resolv_conf: {folder}/resolv.conf, zone_file: {folder}/hosts}}
listeners:
  - {{listen: "[::]:15006 ipv6only=off", direction: inbound, send_proxy_protocol: v1}}
  - {{listen: "[::]:15001 ipv6only=off", direction: outbound, send_proxy_protocol: v1}}
  - {{listen: "[::]:15053 ipv6only=off", direction: dns}}
"""


class FaultError(Exception):
    """Something did not do what it should; says what."""


class Relay:
    """The data plane: one process at a time serves, whoever came before it drains."""

    def __init__(self, lab: Lab, host: Host, folder: Path) -> None:
        self._lab = lab
        self._host = host
        self._folder = folder
        self._log = folder / "relay.log"
        self._reloads = 0
        self._started: list[subprocess.Popen[bytes]] = []
        servers = "".join(f"nameserver {PEER_ADDRESS[family]}\n" for family in Family)
        (folder / "resolv.conf").write_text(servers)
        (folder / "hosts").write_text("240.0.0.1 db.mesh\n")
        self.start()

    def start(self) -> None:
        """Start one, and wait until it serves."""
        self._configure()
        before = len(self._events("ready"))
        argv = ["relay", "--config", str(self._folder / "relay.yaml"), "--user", PROXY_USER, "--log-format", "json"]
        with self._lab.inside(HOST), self._log.open("ab") as log:
            argv = [*self._host.beside(), *shown_python(), "-m", "tpctl.cli.main", *argv]
            self._started.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        self.pid = self._started[-1].pid
        self._wait("ready", before)

    def reload(self) -> None:
        """SIGHUP, with another configuration."""
        before = len(self._events("the configuration was reloaded"))
        self._configure()
        os.kill(self.pid, signal.SIGHUP)
        self._wait("the configuration was reloaded", before)

    def replace(self) -> None:
        """SIGUSR2: a successor takes the sockets over."""
        before = len(self._events("handed over"))
        os.kill(self.pid, signal.SIGUSR2)
        self.pid = int(self._wait("handed over", before)["successor"])

    def crash(self) -> None:
        """SIGKILL; whoever waits in its sockets is lost."""
        os.kill(self.pid, signal.SIGKILL)
        self._gone(_START_SECONDS)

    def end(self) -> None:
        """SIGTERM, and wait until it has drained."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        if not self._gone(DRAIN_SECONDS + 5.0):
            self.crash()
        for process in self._started:
            process.kill()
            process.wait()

    def _gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in self._started:
                process.poll()
            if not is_running(self.pid):
                return True
            time.sleep(0.05)
        return False

    def _configure(self) -> None:
        self._reloads += 1
        text = _RELAY.format(folder=self._folder, drain=DRAIN_SECONDS, idle=600 + self._reloads % 2)
        (self._folder / "relay.yaml").write_text(text)

    def _events(self, event: str) -> list[dict[str, Any]]:
        found = []
        for line in self._log.read_text(errors="replace").splitlines() if self._log.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [one for one in found if str(one.get("event", "")).startswith(event)]

    def _wait(self, event: str, before: int) -> dict[str, Any]:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            found = self._events(event)
            if len(found) > before:
                return found[-1]
            time.sleep(0.05)
        raise FaultError(f"the relay did not say {event!r}: {self._log.read_text(errors='replace')[-2000:]}")

    def complaints(self) -> list[str]:
        """Errors that it has logged."""
        return [str(one["event"]) for one in self._events("") if one.get("level") in ("error", "critical")]


class Plant:
    """Everything there is, and what can be done to it."""

    def __init__(self, lab: Lab, place: OwnPlace, folder: Path) -> None:
        self.lab = lab
        self.place = place
        self.window = Window()
        self.host = Host(lab, place, folder)
        self.relay = Relay(lab, self.host, folder)
        self.engine, self.policy = ENGINES[0], 0
        self._servers = [
            Servers(lab.spaces[HOST], APP, names=False),
            Servers(lab.spaces[PEER], 0, names=True),
        ]

    def applications(self) -> Applications:
        """Begin with the traffic."""
        leaving = [(self.lab.spaces[HOST], APP, Way(af, REMOTES[af], True)) for af in _FAMILIES]
        arriving = [(self.lab.spaces[PEER], 0, Way(af, str(HOST_ADDRESS[v]), False)) for af, v in _FAMILIES.items()]
        return Applications([*leaving, *arriving], self.window)

    def close(self) -> None:
        """End all of it."""
        with contextlib.suppress(FaultError):
            self.tpctl("uninstall")
        self.relay.end()
        for servers in self._servers:
            servers.stop()
        self.host.close()

    def tpctl(self, *argv: str, exits: Sequence[int] = (0,)) -> str:
        """Run the command; what it printed. Raises FaultError when it ends otherwise than with one of `exits`."""
        return self._run([sys.executable, "-m", "tpctl.cli.main", *argv], exits)

    def shell(self, script: str) -> str:
        """Run a script on the host, beside the command."""
        return self._run(["sh", "-ec", script], (0,))

    def _run(self, argv: Sequence[str], exits: Sequence[int]) -> str:
        with self.lab.inside(HOST):
            done = subprocess.run(
                [*self.host.beside(), *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=COMMAND_SECONDS, check=False, cwd=ROOT_DIRECTORY,
            )  # fmt: skip
        if done.returncode not in exits:
            raise FaultError(f"{' '.join(argv[-6:])} exited with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def install(self) -> None:
        """Install what is to be installed now."""
        self.tpctl("install", *PROXY_FLAGS, *FLAVOURS[self.engine], *POLICIES[self.policy])

    def status(self, *, wanted: bool = True) -> None:
        """Ask for the status. Raises FaultError unless it finds drift or problems exactly if it should."""
        found = json.loads(self.tpctl("status", "--json", exits=(0, 3)))
        complaints = [*found["problems"], *found["drift"]]
        if bool(complaints) is wanted:
            raise FaultError(f"status under {self.engine}: {complaints or 'nothing of what was changed'}")

    def remove_rules(self) -> None:
        """What a foreign program could do to what is installed."""
        self.shell(_REMOVAL[self.engine])

    def add_rules(self) -> None:
        """What a foreign program could add to it. For the eBPF engine there is nothing to add to."""
        self.shell(_ADDITION[self.engine])


_IPTABLES = "for t in iptables-{0} ip6tables-{0}; do $t -w 20 -t nat {1}; done"
_REMOVAL = {
    "nftables": "nft flush table inet tpctl",
    "iptables nft": _IPTABLES.format("nft", "-F TPCTL_OUTBOUND"),
    "iptables legacy": _IPTABLES.format("legacy", "-F TPCTL_OUTBOUND"),
    "ebpf": 'rm "$(find /sys/fs/bpf -type f -name "connect4*" | head -n 1)"',
}
_FIRST_CHAIN = """$(nft list table inet tpctl | awk '$1 == "chain" { print $2; exit }')"""
_ADDITION = {
    "nftables": f"nft add rule inet tpctl {_FIRST_CHAIN} accept",
    "iptables nft": _IPTABLES.format("nft", "-A TPCTL_OUTBOUND -p udp --dport 9 -j ACCEPT"),
    "iptables legacy": _IPTABLES.format("legacy", "-A TPCTL_OUTBOUND -p udp --dport 9 -j ACCEPT"),
    "ebpf": 'rm "$(find /sys/fs/bpf -type f -name "connect6*" | head -n 1)"',
}


@contextlib.contextmanager
def plant(folder: Path) -> Iterator[Plant]:
    """For the length of the block."""
    folder.chmod(0o755)  # the relay reads its files as its user
    with own_place() as place, Lab(Layout()) as lab:
        for name in (HOST, PEER):
            with lab.inside(name):
                write_sysctls(_SYSCTLS)
        made = Plant(lab, place, folder)
        try:
            yield made
        finally:
            made.close()
