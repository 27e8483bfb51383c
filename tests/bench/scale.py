"""`make bench-scale`: what a policy of thousands of exclusions costs, on each engine, beside the empty policy.

Every contender has namespaces of its own, in which two applications (IPv4 and IPv6) open connections to a remote
address as fast as they can; the redirection takes them to a listener that accepts and closes. No exclusion matches, so
each connection is compared with all of them. The contenders take turns, so that a slower minute of the machine meets
all of them. Nothing here is a test of speed: the exit code is 0 unless something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from multiprocessing.connection import Connection as Pipe

import tpctl
from tests.swap.scene import outbound, prepared_namespaces
from tests.swap.swaps import IPTABLES_LEGACY, IPTABLES_NFT, NFTABLES, name
from tests.swap.traffic import APP, FAMILIES, PROXY, Child, Route
from tpctl.change import lifecycle, removal
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Outbound, Policy, PortRange

NETWORKS = 5000
PORT_RANGES = 2000
ROUNDS = 5
ROUND_SECONDS = 1.0


def large(networks: int, port_ranges: int) -> Policy:
    """A policy whose exclusions neither merge nor match: half the networks are IPv6, each range has four ports."""
    excluded = [ip_network((0x0A000000 + 512 * number, 24)) for number in range(networks - networks // 2)]
    excluded += [ip_network((0xFD << 120 | 2 * number << 64, 64)) for number in range(networks // 2)]
    step = 50000 // port_ranges
    ports = tuple(PortRange(first, first + 3) for first in range(10000, 10000 + port_ranges * step, step))
    return Policy(PROXY, outbound=Outbound(exclude_destinations=tuple(excluded), exclude_ports=ports))


def _accept_and_close(pipe: Pipe) -> None:
    """The simplest data plane, of both families; ends with its process."""
    listener = socket.create_server(("::", 15001), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    pipe.send("ready")
    while True:
        made, _ = listener.accept()
        made.close()


def _open_and_close(pipe: Pipe, route: Route) -> None:
    """As many connections as possible in the seconds that the pipe tells, again and again; 0 ends it."""
    limit = struct.pack("ll", 3, 0)
    pipe.send("ready")
    while seconds := pipe.recv():
        count = 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            with socket.socket(route.family, socket.SOCK_STREAM) as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                made.connect((route.address, route.port))
                made.recv(1)
            count += 1
        pipe.send(count)


@dataclass(slots=True)
class Contender:
    """A policy in an engine, in namespaces of its own."""

    options: EngineOptions
    policy: Policy
    label: str
    install_seconds: float = 0.0
    rates: list[float] = field(default_factory=list)
    """New connections a second, by round."""
    clients: list[Child] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    def run(self, seconds: float) -> float:
        """One round; hands back the rate."""
        for client in self.clients:
            client.pipe.send(seconds)
        return sum(int(client.pipe.recv()) for client in self.clients) / seconds


@contextlib.contextmanager
def standing(contender: Contender) -> Iterator[Contender]:
    """Install it, and have its processes wait, for the length of the block."""
    with prepared_namespaces() as (host, _):
        try:
            with host.inside():
                started = time.perf_counter()
                lifecycle.install(contender.policy, contender.options)
                contender.install_seconds = time.perf_counter() - started
            server = Child(host, PROXY, _accept_and_close)
            contender.clients = [Child(host, APP, _client(outbound(family))) for family in FAMILIES]
            yield contender
            for client in contender.clients:
                client.pipe.send(0)
                client.process.join(10)
            server.process.terminate()
            server.process.join(10)
        finally:
            with host.inside():
                removal.uninstall()


def _client(route: Route) -> Callable[[Pipe], None]:
    return lambda pipe: _open_and_close(pipe, route)


def measure(contenders: Sequence[Contender]) -> None:
    """The rates of all, round by round; the first round only warms up."""
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            stack.enter_context(standing(contender))
        for number in range(ROUNDS + 1):
            for contender in contenders:
                rate = contender.run(ROUND_SECONDS)
                if number:
                    contender.rates.append(rate)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=NETWORKS, help="excluded CIDRs (default: %(default)s)")
    parser.add_argument("--port-ranges", type=int, default=PORT_RANGES, help="excluded (default: %(default)s)")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    print(f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}")
    exclusions = f"{given.networks} CIDRs, {given.port_ranges} port ranges"
    pairs = [
        (
            Contender(options, Policy(PROXY), "no exclusions"),
            Contender(options, large(given.networks, given.port_ranges), exclusions),
        )
        for options in (NFTABLES, IPTABLES_NFT, IPTABLES_LEGACY)
    ]
    measure([contender for pair in pairs for contender in pair])
    print(f"{'engine':<18}{'outbound exclusions':<32}{'install s':>10}{'connections/s (min-max)':>28}{'ratio':>8}")
    for empty, full in pairs:
        for contender in (empty, full):
            span = f"{contender.rate:.0f} ({min(contender.rates):.0f}-{max(contender.rates):.0f})"
            ratio = f"{contender.rate / empty.rate:.2f}"
            print(
                f"{name(contender.options):<18}{contender.label:<32}{contender.install_seconds:>10.2f}{span:>28}{ratio:>8}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
