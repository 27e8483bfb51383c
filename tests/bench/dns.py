"""`make bench-dns`: the relay's DNS beside dnsmasq, unbound, CoreDNS, and no proxy at all.

dnsperf, or a client of one query at a time, asks a name server on another host, over a veth pair. The queries are
redirected by the same rule to each DNS proxy in turn, which forwards them, or answers from a thousand local names. Each
proxy has one process or thread: the relay one worker. What a proxy's own work costs is the CPU time of its control
group, with what the kernel does on behalf of its processes, and hardly depends on who else uses the machine; rates do.

As in `make bench-relay`, each round has fresh namespaces and processes, which take turns there and back again. CoreDNS
is measured where it is installed. The exit code is 1 when the relay has lost a query, or anybody has answered
one by an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tpctl
from tests.bench.dns_planes import BESIDE, FORWARDED, LOCAL, PLANES, plane, upstream
from tests.bench.engines import progress, spread
from tests.bench.planes import SERVER
from tests.bench.relay import Standing, used_by
from tests.bench.wrk import inside
from tests.netns.relay.net import Net
from tpctl.rehearsal.cgroup import enter, own_groups
from tpctl.rehearsal.namespaces import write_sysctls
from tpctl.system.errors import TpctlError

ROUNDS = 3
SECONDS = 2
GOAL = 0.8
"""Of dnsmasq without a cache, in queries for the same CPU time."""
SYSCTLS = {"ipv4/ip_local_port_range": "1024 65535", "netfilter/nf_conntrack_udp_timeout": "10"}
"""Each forwarded query may have a port of its own, and conntrack has room for 262 144."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked: the names of a file, by so many clients, each of which waits for its answer before it goes on."""

    name: str
    names: str
    clients: int

    @property
    def goes_on(self) -> bool:
        """Whether the queries are forwarded."""
        return self.names == FORWARDED


CELLS = tuple(
    Cell(f"{names}, {clients} client{'s' if clients > 1 else ''}", names, clients)
    for names in (FORWARDED, LOCAL)
    for clients in (1, 50)
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement."""

    rate: float
    """Answers a second."""
    cpu: float
    """Microseconds of the proxy's CPU time for each."""
    everybody: float
    """The same of client, proxy and name server together."""
    latency: float
    """Microseconds that a client waits, on average."""
    lost: int


@dataclass(slots=True)
class Results:
    """All measurements, by proxy and cell."""

    figures: dict[tuple[str, str], list[Figures]] = field(default_factory=dict)

    def of(self, name: str, cell: Cell, what: str) -> list[float]:
        """In the order in which they were measured."""
        return [getattr(one, what) for one in self.figures.get((name, cell.name), [])]

    def ratios(self, name: str, cell: Cell, what: str) -> list[float]:
        """The relay's to a peer's, of the same turn."""
        pairs = zip(self.of("relay", cell, what), self.of(name, cell, what), strict=True)
        return [mine / theirs for mine, theirs in pairs]


@contextlib.contextmanager
def standing(name: str, home: Path) -> Iterator[Standing]:
    """Namespaces, redirection, proxy and name server, for the length of the block."""
    net = Net()
    cgroup = home / f"{name}-{net.host}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpctl-bench-")))
        folder.chmod(0o755)
        cgroup.mkdir()
        stack.callback(cgroup.rmdir)
        stack.callback(net.remove)
        net.create(redirect=name != "none")
        for space in (net.host, net.peer):
            with net.inside(space):
                write_sysctls(SYSCTLS)
        stack.enter_context(upstream(net, folder))
        enter(cgroup)
        try:
            stack.enter_context(plane(net, name, folder))
        finally:
            enter(home)
        at = Standing(net, cgroup, folder)
        for names in (FORWARDED, LOCAL) if name != "none" else ():
            ask(at, names, 50, "-n", "1")  # what remembers answers has them from now on
        yield at


def ask_one_by_one(at: Standing, cell: Cell, seconds: float) -> Figures:
    """One client, by `tests.bench.asking`."""
    program = (sys.executable, "-m", "tests.bench.asking", SERVER, "53", str(at.folder / cell.names), str(seconds))
    said, own, everybody = used_by(at, *inside(at.net.host), *program)
    answered, took, lost = (float(word) for word in said.split())
    each = 1e6 / answered
    return Figures(answered / took, own * each, everybody * each, took * each, int(lost))


def ask(at: Standing, names: str, clients: int, *limit: str) -> tuple[str, float, float]:
    """Ask by dnsperf; see `used_by`."""
    count = str(clients)
    program = ("dnsperf", "-s", SERVER, "-d", str(at.folder / names), "-c", count, "-q", count, *limit)
    return used_by(at, *inside(at.net.host), *program)


def number(text: str, said: str) -> float:
    """What stands behind a text in the output of dnsperf."""
    found = re.search(rf"{text}:? +([0-9.]+)", said)
    if found is None:
        raise AssertionError(f"dnsperf does not say {text!r}:\n{said}")
    return float(found[1])


def measure(at: Standing, cell: Cell, seconds: float) -> Figures:
    """One measurement. Raises AssertionError when a query was answered by an error."""
    if cell.clients == 1:
        return ask_one_by_one(at, cell, seconds)
    said, own, everybody = ask(at, cell.names, cell.clients, "-l", str(seconds))
    answered, lost, rate = (number(text, said) for text in ("NOERROR", "Queries lost", "Queries per second"))
    if answered + lost != number("Queries sent", said):
        raise AssertionError(f"{cell.name}: queries were answered by an error:\n{said}")
    each = 1e6 / answered
    return Figures(rate, own * each, everybody * each, number(r"Average Latency \(s\)", said) * 1e6, int(lost))


def measure_round(home: Path, results: Results, options: argparse.Namespace) -> None:
    """Everything there and back again."""
    with contextlib.ExitStack() as stack:
        ready = [(name, stack.enter_context(standing(name, home))) for name in options.planes]
        for cell in options.cells:
            for order in (ready, ready[::-1]):
                for name, at in order:
                    if name == "none" and not cell.goes_on:
                        continue
                    progress(f"{name}: {cell.name}")
                    figures = measure(at, cell, options.seconds / 2)
                    results.figures.setdefault((name, cell.name), []).append(figures)
    progress("")


def show(results: Results, cells: Sequence[Cell]) -> None:
    """The tables, and how the goal fared."""
    heads = ("queries/s", "relay / it", "us/query", "relay / it", "all, us/query", "latency, us", "lost")
    verdicts = []
    widths = (22, 18, 22, 18, 18, 18, 6)
    for cell in cells:
        print(f"\n{cell.name}")
        print(f"  {'':<15}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
        for name in PLANES:
            rates = results.of(name, cell, "rate")
            if not rates:
                continue
            words = []
            for what, form in (("rate", "{:.0f}"), ("cpu", "{:.1f}")):
                shown = name != "none" or what != "cpu"
                words.append(spread(results.of(name, cell, what), form) if shown else "")
                compared = shown and name != "relay" and results.of("relay", cell, what)
                words.append(spread(results.ratios(name, cell, what), "{:.2f}") if compared else "")
            words += [spread(results.of(name, cell, what), "{:.0f}") for what in ("everybody", "latency")]
            words.append(f"{sum(results.of(name, cell, 'lost')):.0f}")
            print(f"  {name:<15}" + "".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True)))
        if all(results.of(name, cell, "cpu") for name in ("relay", BESIDE)):
            ratio = 1 / statistics.median(results.ratios(BESIDE, cell, "cpu"))
            rate = statistics.median(results.ratios(BESIDE, cell, "rate"))
            verdict = "met" if ratio >= GOAL else "SHORT"
            verdicts.append(
                f"  {cell.name:<24}{ratio:>6.2f} by CPU time (>= {GOAL:.2f}: {verdict}), {rate:.2f} by rate"
            )
    if verdicts:
        print(f"\nthe relay's queries beside those of {BESIDE}", *verdicts, sep="\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each cell in a round (default: %(default)s)")
    parser.add_argument("--planes", nargs="+", choices=PLANES, help="(default: all that are installed)")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    options = parser.parse_args(arguments)
    options.planes = options.planes or [name for name in PLANES if name != "coredns" or shutil.which(name)]
    options.cells = [cell for cell in CELLS if options.only in cell.name]
    return options


def main() -> int:
    """Run it."""
    options = parse()
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    versions = f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}"
    print(f"{versions}, {os.cpu_count()} processors; {options.rounds} rounds")
    print("median (lowest-highest) over the rounds; all: CPU time of client, proxy and name server together")
    started, results = time.monotonic(), Results()
    try:
        with own_groups() as groups:
            for _ in range(options.rounds):
                measure_round(groups.home, results, options)
    except (AssertionError, OSError, TpctlError, subprocess.SubprocessError) as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    show(results, options.cells)
    print(f"{time.monotonic() - started:.0f} s")
    lost = sum(sum(results.of("relay", cell, "lost")) for cell in options.cells)
    if lost:
        print(f"error: the relay has lost {lost:.0f} queries", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
