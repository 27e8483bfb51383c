"""`make bench-engines`: what each engine's redirection costs, through the same Envoy and through the same relay.

wrk asks nginx for two bytes over a veth pair, in both directions: by a new connection for each request ("Connection:
close"), and over connections that are kept. Between the two stands one worker of the data plane, reached through each
engine in turn, or nothing at all. Client, data plane and server share the machine's processors, which are busy nearly
all the time; so the rate follows from what a connection costs all of them together.

Each round has fresh namespaces and fresh data planes, so that no TIME_WAIT of another one is in the way; all of them
stand ready at once, and take turns of a second, so that a slower minute of the machine meets all of them. A ratio
compares an engine with iptables a few seconds earlier or later; the table has the median, the lowest and the highest.
CPU is what all processes of a measurement used, by their cgroup, and hardly depends on who else uses the machine. wrk's
latency begins with the request, after the connection is made. Nothing here is a test of speed: the exit code is 0
unless something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tpctl
from tests.bench.wrk import CONNECTIONS, PORT, WORKLOADS, Figures, Standing, Workload, measure, server
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, RELAY_UID, Net
from tests.netns.test_envoy import running_envoy
from tpctl.engines import registry
from tpctl.engines.base import Engine
from tpctl.rehearsal.cgroup import OwnPlace, enter, own_groups, own_place
from tpctl.rehearsal.namespaces import write_sysctls
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Inbound, Policy, PortRange
from tpctl.system.errors import TpctlError

ROUNDS = 5
EXPECTED = 1.10
QUIET = 0.7
"""What the measurements have of the processors while nobody else uses them; a little less than all."""
POLICY = Policy(RELAY_UID, inbound=Inbound(exclude_ports=(PortRange(22),)), dns=Dns(DnsCapture.ALL))

IPTABLES, NONE = "iptables nft", "no redirection"
ENGINES = {
    IPTABLES: EngineOptions(engine="iptables", iptables_mode="nft"),
    "iptables legacy": EngineOptions(engine="iptables", iptables_mode="legacy"),
    "nftables": EngineOptions(engine="nftables"),
    "ebpf": EngineOptions(engine="ebpf"),
}
DATA_PLANES = ("envoy", "relay")
SYSCTLS = {"ipv4/ip_local_port_range": "1024 65535", "ipv4/tcp_tw_reuse": "1", "ipv4/tcp_max_syn_backlog": "4096"}


@contextlib.contextmanager
def redirected(net: Net, options: EngineOptions | None, place: OwnPlace) -> Iterator[None]:
    """Our host behind an engine; the eBPF engine is kept to our own cgroup."""
    if options is None:
        yield
        return
    with net.inside(net.host):
        engine: Engine[Any] = place.engine() if options.engine == "ebpf" else registry.select(options).engine
        engine.apply(engine.plan(POLICY))
    try:
        yield
    finally:
        with net.inside(net.host):
            engine.remove()


def data_plane(net: Net, name: str, folder: Path) -> contextlib.AbstractContextManager[object]:
    """One worker of it, as its own user."""
    if name == "envoy":
        return running_envoy(net, folder / "envoy.log")
    return relay_net.relay(net, folder)


def require_redirection(net: Net, expected: bool) -> None:
    """Raise AssertionError unless the server sees another client exactly when a data plane should stand between."""
    for name, address in ((net.host, PEER), (net.peer, HOST)):
        with net.connect(name, (address[socket.AF_INET], PORT)) as client:
            own = f"{client.getsockname()[0]} {client.getsockname()[1]}"
            client.sendall(b"GET /who HTTP/1.0\r\n\r\n")
            seen = relay_net.read_all(client).decode().rpartition("\r\n")[2]
        if (seen != own) != expected:
            raise AssertionError(f"{own} was seen as {seen}")


def progress(text: str) -> None:
    """Tell somebody who watches how far it is."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Contender:
    """An engine in front of a data plane, and its figures by workload."""

    engine: str
    plane: str | None
    figures: dict[str, list[Figures]] = field(default_factory=dict)

    def measure(self, standing: Standing, workload: Workload) -> None:
        """One more measurement."""
        progress(f"{self.plane or '-'}, {self.engine}: {workload.name}")
        self.figures.setdefault(workload.name, []).append(measure(standing, workload))

    def ratios(self, workload: Workload, base: Contender, of: str) -> list[float]:
        """To another one, round by round."""
        pairs = zip(self.figures[workload.name], base.figures[workload.name], strict=True)
        return [float(getattr(mine, of) / getattr(other, of)) for mine, other in pairs]

    def row(self, workload: Workload, base: Contender) -> str:
        """One line of the table."""
        mine = self.figures[workload.name]
        rate = spread([figures.rate for figures in mine], "{:.0f}")
        rates, cpus = (spread(self.ratios(workload, base, of), "{:.2f}") for of in ("rate", "cpu"))
        cpu = statistics.median(figures.cpu for figures in mine) * 1e6
        half, most = (statistics.median(getattr(figures, of) for figures in mine) * 1e3 for of in ("median", "slow"))
        return f"  {self.engine:<16}{rate:>24}{rates:>18}{cpu:>9.1f}{cpus:>18}{half:>9.2f}{most:>9.2f}"


def spread(values: Sequence[float], form: str) -> str:
    """Median, lowest and highest."""
    middle, *ends = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({'-'.join(ends)})"


@contextlib.contextmanager
def standing(contender: Contender, home: Path) -> Iterator[Standing]:
    """Its namespaces, engine, data plane and servers, in a cgroup of their own, for the length of the block.

    That cgroup lies below `home`, beside those of the others: in one below theirs, their programs would run, too.
    """
    net = Net()
    with own_place() as place, contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpctl-bench-")))
        folder.chmod(0o755)
        stack.callback(net.remove)
        net.create(redirect=False)
        for space in (net.host, net.peer):
            with net.inside(space):
                write_sysctls(SYSCTLS)
        stack.enter_context(redirected(net, ENGINES.get(contender.engine), place))
        if contender.plane:
            stack.enter_context(data_plane(net, contender.plane, folder))
        stack.enter_context(server(net, net.host, HOST[socket.AF_INET], folder / "host"))
        stack.enter_context(server(net, net.peer, PEER[socket.AF_INET], folder / "peer"))
        require_redirection(net, contender.plane is not None)
        if place.cgroup.parent != home:
            raise AssertionError(f"{place.cgroup} does not lie right below {home}")
        enter(home)
        yield Standing(net, place.cgroup, folder)


def measure_all(rounds: int, contenders: Sequence[Contender], chosen: Sequence[Workload]) -> None:
    """Everything. Each round is there and back again, so that nobody always follows the same one."""
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            home = stack.enter_context(own_groups()).home
            ready = [(contender, stack.enter_context(standing(contender, home))) for contender in contenders]
            for workload in chosen:
                for order in (ready, reversed(ready))[: workload.slices]:
                    for contender, at in order:
                        contender.measure(at, workload)
    progress("")


def report(contenders: Sequence[Contender], chosen: Sequence[Workload]) -> None:
    """The tables, and how the expectation fared."""
    verdicts = []
    for plane, workload in itertools.product(DATA_PLANES, chosen):
        shown = {contender.engine: contender for contender in contenders if contender.plane in (plane, None)}
        base = shown[IPTABLES]
        print(f"\n{workload.name}, through one worker of {plane}")
        print(f"  {'':<16}{workload.unit:>24}{'ratio':>18}{'CPU us':>9}{'ratio':>18}{'p50 ms':>9}{'p99 ms':>9}")
        for contender in shown.values():
            print(contender.row(workload, base))
        rate, cpu = (statistics.median(shown["ebpf"].ratios(workload, base, of)) for of in ("rate", "cpu"))
        if workload.new:
            verdict = "ok" if rate >= EXPECTED else "BELOW"
            verdicts.append(f"  {plane}, {workload.name}: {rate:.2f} ({verdict}); by CPU time {1 / cpu:.2f}")
    busy = [one.cpu * one.rate for contender in contenders for figures in contender.figures.values() for one in figures]
    share = statistics.median(busy) / (os.cpu_count() or 1)
    if share < QUIET:
        print(f"\nothers left {share:.0%} of the processors: the ratios of CPU time hold, those of rates hardly do")
    print(f"\nebpf beside {IPTABLES}, connections/s; expected: at least {EXPECTED:.2f}", *verdicts, sep="\n")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each engine (default: %(default)s)")
    rounds = parser.parse_args().rounds
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    contenders = [Contender(engine, plane) for plane in DATA_PLANES for engine in ENGINES]
    contenders.append(Contender(NONE, None))  # compared with both
    print(f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}, ", end="")
    print(f"{os.cpu_count()} processors; {rounds} rounds, {CONNECTIONS} connections at a time")
    print(f"median (lowest-highest) of all measurements; ratios to {IPTABLES} at the same time")
    started = time.monotonic()
    try:
        measure_all(rounds, contenders, WORKLOADS)
    except (AssertionError, OSError, TpctlError) as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    report(contenders, WORKLOADS)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
