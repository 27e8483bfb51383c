"""The scene of a swap: a host with a data plane and an application's server, and a peer that calls and is called."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tests.netns.lab import run
from tests.swap import kumactl
from tests.swap.traffic import APP, FAMILIES, INBOUND, OUTBOUND, PROXY, REAL, REAL_PORT, Applications, Route, Servers
from tpctl.change import lifecycle, removal, rollback
from tpctl.rehearsal.cgroup import OwnPlace, own_place
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Layout
from tpctl.rehearsal.namespaces import Namespace, write_sysctls
from tpctl.rehearsal.topology import build
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy

REMOTES = {socket.AF_INET: "203.0.113.10", socket.AF_INET6: "2001:db8:10::10"}
HOST_ADDRESSES = {
    socket.AF_INET: str(HOST_ADDRESS[Family.IPV4]),
    socket.AF_INET6: str(HOST_ADDRESS[Family.IPV6]),
}

_SYSCTLS = {
    # Enough ports that none is needed again before its connection is over, on either side and in conntrack.
    "ipv4/ip_local_port_range": "10000 60000",
    "ipv4/tcp_tw_reuse": "1",
    "ipv4/tcp_fin_timeout": "5",
    "ipv4/tcp_max_syn_backlog": "4096",
    # A connection that gets no answer fails after three seconds and not after two minutes.
    "ipv4/tcp_syn_retries": "1",
    "netfilter/nf_conntrack_tcp_timeout_time_wait": "3",
}


def outbound(family: socket.AddressFamily, expected: bytes = OUTBOUND) -> Route:
    """What an application of the host dials."""
    return Route(family, REMOTES[family], expected)


def inbound(family: socket.AddressFamily, expected: bytes = INBOUND) -> Route:
    """What the peer dials."""
    return Route(family, HOST_ADDRESSES[family], expected)


@contextmanager
def prepared_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """A host and a peer for many short connections, for the length of the block. Nothing runs in them."""
    spaces = build(Layout())
    try:
        for space in spaces.values():
            with space.inside():
                write_sysctls(_SYSCTLS)
        yield spaces[HOST], spaces[PEER]
    finally:
        for space in spaces.values():
            space.close()


def kept_to(place: OwnPlace, options: EngineOptions) -> EngineOptions:
    """The same, but that eBPF programs reach no process outside of a place."""
    return replace(options, ebpf_cgroup=str(place.cgroup), ebpf_bpffs=str(place.pins))


class Scene:
    """Two connected namespaces and the servers in them. Nothing is installed, and conntrack is idle."""

    def __init__(self, host: Namespace, peer: Namespace, place: OwnPlace) -> None:
        """`host` is where the swaps happen, `peer` every other host; all processes are in the `place`."""
        self.host = host
        self.peer = peer
        self._place = place
        self._servers = [
            Servers(host, PROXY, {15001: OUTBOUND, 15006: INBOUND}),
            Servers(host, APP, {REAL_PORT: REAL}),
            Servers(peer, 0, {REAL_PORT: REAL}),
        ]

    def applications(self) -> Applications:
        """One process for each family and direction, paused."""
        leaving = [(self.host, APP, outbound(family)) for family in FAMILIES]
        arriving = [(self.peer, 0, inbound(family)) for family in FAMILIES]
        return Applications([*leaving, *arriving])

    def install(
        self, policy: Policy, options: EngineOptions, confirm_within: float | None = None
    ) -> lifecycle.InstallReport:
        """`tpctl install` on the host; with `confirm_within` (seconds) it can be rolled back."""
        with self.host.inside():
            return lifecycle.install(policy, kept_to(self._place, options), confirm_within=confirm_within)

    def roll_back(self) -> rollback.Outcome | None:
        """`tpctl rollback` on the host."""
        with self.host.inside():
            return rollback.take_back()

    def install_kumactl(self, variant: str, *, full: bool) -> None:
        """Take everything of tpctl away, and leave what kumactl would have installed. Not without a gap."""
        with self.host.inside():
            removal.uninstall()
            for family, tool in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables")):
                command = [f"{tool}-{variant}-restore", "--noflush", "--wait=5"]
                run(command, stdin=kumactl.ruleset(family, full=full))

    def uninstall(self) -> None:
        """`tpctl uninstall` on the host."""
        with self.host.inside():
            removal.uninstall()

    def close(self) -> None:
        """End the servers, and take everything away that was installed."""
        for servers in self._servers:
            servers.stop()
        self.uninstall()  # or the record under /run/tpctl would outlive the namespace


@contextmanager
def scene() -> Iterator[Scene]:
    """A scene for the length of the block."""
    with own_place() as place, prepared_namespaces() as (host, peer):
        made = Scene(host, peer, place)
        try:
            yield made
        finally:
            made.close()
