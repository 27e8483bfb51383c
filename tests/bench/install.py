"""`make bench-install`: what `tpctl install` costs beside the bare programs, and what starting the command costs.

Every timed run has a network namespace of its own, made for it and gone after it; this machine's own rules are neither
read nor changed. The contenders take turns, so that a slower minute of the machine meets all of them. Nothing here is
a test of speed: the exit code is 0 unless something failed to run.
"""

from __future__ import annotations

import compileall
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tpctl
from tests.netns.lab import bare_namespace, run

RUNS = 7
START_RUNS = 20
PROCESS_LIMITS = {"nftables": 6, "ebpf": 6}
PROCESS_LIMIT = 12
"""Of the other engines: iptables has two programs a family."""
HELP_LIMIT = 1.1
LIMITS = {"install": 1.5, "status": 1.3, "uninstall": 1.5}
"""Times what `IMPORTS` takes, of CPU time and by the clock."""
IMPORTS = "import click, structlog"

PYTHON = sys.executable
TPCTL = str(Path(PYTHON).with_name("tpctl"))
INSTALL = (TPCTL, "install", "--kuma-dp-user", "nobody", "--exclude-inbound-ports", "22")
IPTABLES = ("--engine", "iptables", "--iptables-mode")
NFTABLES = ("--engine", "nftables")
ENGINES = {
    "nftables": NFTABLES,
    "iptables, nft": (*IPTABLES, "nft"),
    "iptables, legacy": (*IPTABLES, "legacy"),
    "ebpf": ("--engine", "ebpf"),
}
FAMILIES = ("iptables", "ip6tables")
FAMILY_HEADING = re.compile(r"^### IPv[46] ###\n", re.MULTILINE)

Argv = Sequence[str]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run, in seconds; `cpu` is user and system time of the program and of every process it waited for."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(slots=True)
class Series:
    """The runs of one contender."""

    name: str
    costs: list[Cost] = field(default_factory=list)

    def median(self, of: str) -> float:
        """In seconds; `of` is "wall" or "cpu"."""
        return statistics.median(float(getattr(cost, of)) for cost in self.costs)

    def row(self) -> str:
        """Median, lowest and highest of both, in milliseconds."""
        cells = []
        for of in ("wall", "cpu"):
            values = [1000 * getattr(cost, of) for cost in self.costs]
            cells.append(f"{statistics.median(values):7.1f} ({min(values):.1f}-{max(values):.1f})")
        return f"  {self.name:<46} {cells[0]:<24} {cells[1]}"


def timed(argv: Argv, text: str = "", codes: Sequence[int] = (0,)) -> Cost:
    """Run a program to its end in the current namespace. Raises AssertionError unless it exits with one of `codes`."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
        given.write(text)
        given.seek(0)
        started = time.perf_counter()
        child = subprocess.Popen(list(argv), stdin=given, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in codes:
            said.seek(0)
            raise AssertionError(f"{' '.join(argv)} exited with {child.returncode}:\n{said.read()}")
    return Cost(wall, used.ru_utime + used.ru_stime)


def install(*flags: str) -> Cost:
    """`tpctl install` in a fresh namespace."""
    with bare_namespace() as space, space.inside():
        try:
            return timed([*INSTALL, *flags])
        finally:
            run([TPCTL, "uninstall"])  # or the record under /run/tpctl would outlive the namespace


def bare(*commands: tuple[Argv, str]) -> Cost:
    """Programs, each with its input, one after the other in a fresh namespace."""
    with bare_namespace() as space, space.inside():
        cost = Cost(0.0, 0.0)
        for argv, text in commands:
            cost += timed(argv, text)
        return cost


def dry_run(*flags: str) -> str:
    """What `tpctl install --dry-run` prints on a host where nothing is installed."""
    with bare_namespace() as space, space.inside():
        return run([*INSTALL, *flags, "--dry-run"]).stdout


def restores(variant: str) -> tuple[tuple[Argv, str], ...]:
    """The two restore programs, each with the text of its family."""
    shown = dry_run(*IPTABLES, variant)
    _, *texts = FAMILY_HEADING.split(shown)
    if len(texts) != len(FAMILIES):
        raise AssertionError(f"expected the text of two families:\n{shown}")
    tools = (f"{tool}-{variant}-restore" for tool in FAMILIES)
    return tuple(([tool, "--noflush"], text) for tool, text in zip(tools, texts, strict=True))


@dataclass(frozen=True, slots=True)
class Started:
    """What an install started, itself included."""

    processes: int
    programs: int
    """Those that executed a program; the others are forked children."""


def processes(*flags: str) -> Started:
    """Count what one install starts, by strace(1)."""
    with bare_namespace() as space, space.inside(), tempfile.NamedTemporaryFile("r") as trace:
        tracer = ["strace", "-f", "-qq", "-e", "trace=execve,exit_group", "-e", "signal=none", "-o", trace.name]
        try:
            run([*tracer, *INSTALL, *flags])
        finally:
            run([TPCTL, "uninstall"])
        lines = trace.read().splitlines()
    executed = [line for line in lines if "execve" in line and line.endswith("= 0")]
    return Started(len({line.split()[0] for line in lines}), len(executed))


def take_turns(contenders: Sequence[tuple[str, Callable[[], Cost]]], runs: int = RUNS) -> list[Series]:
    """Each contender once, then each again, `runs` times; the first round only warms the caches."""
    series = [Series(name) for name, _ in contenders]
    for number in range(runs + 1):
        for (_, contender), results in zip(contenders, series, strict=True):
            cost = contender()
            if number:
                results.costs.append(cost)
    return series


def heading(text: str) -> None:
    """Print a heading with the names of the columns."""
    print(f"\n{text}\n  {'':<46} {'wall ms (min-max)':<24} cpu ms (min-max)")


def commands(flags: Sequence[str]) -> Iterator[tuple[str, Cost]]:
    """The commands of one installation in a fresh namespace, from the first to the last, and what each costs."""
    with bare_namespace() as space, space.inside():
        yield "install", timed([*INSTALL, *flags])
        yield "status", timed([TPCTL, "status"], codes=(0, 3))  # nobody listens
        yield "uninstall", timed([TPCTL, "uninstall"])


def bench_commands() -> None:
    """Each command beside the imports of a program that does nothing."""
    heading(f"commands beside python -c '{IMPORTS}', which comes first: medians of {RUNS} runs; the probes left out")
    measured = {name: Series(name) for name in (IMPORTS, *(f"{c} ({engine})" for engine in ENGINES for c in LIMITS))}
    for number in range(RUNS + 1):
        costs = [(IMPORTS, timed([PYTHON, "-c", IMPORTS]))]
        for engine, flags in ENGINES.items():
            costs += [(f"{command} ({engine})", cost) for command, cost in commands([*flags, "--no-probe"])]
        for name, cost in costs if number else ():
            measured[name].costs.append(cost)
    basis = measured[IMPORTS]
    for name, series in measured.items():
        row = series.row()
        if series is not basis:
            limit = LIMITS[name.partition(" ")[0]]
            wall, cpu = (series.median(of) / basis.median(of) for of in ("wall", "cpu"))
            row += f"  {wall:.1f}, {cpu:.1f} times; at most {limit:g}: {verdict(max(wall, cpu) <= limit)}"
        print(row)


def verdict(holds: bool) -> str:
    """How a limit fared."""
    return "ok" if holds else "OVER"


def bench_install() -> None:
    """Install against the bare programs given the same text, in both variants of iptables and with nftables."""
    pairs: list[tuple[str, tuple[str, ...], str, tuple[tuple[Argv, str], ...]]] = []
    for variant in ("nft", "legacy"):
        name = f"iptables-restore + ip6tables-restore ({variant})"
        pairs.append((f"tpctl install (iptables, {variant})", (*IPTABLES, variant), name, restores(variant)))
    nft = (["nft", "--file", "-"], dry_run(*NFTABLES))
    pairs.append(("tpctl install (nftables)", NFTABLES, "nft --file -", (nft,)))
    rules = sum(line.startswith(("-A ", "-I ")) for _, text in pairs[0][3] for line in text.splitlines())
    heading(f"{' '.join(['tpctl', *INSTALL[1:]])}: {rules} iptables rules, medians of {RUNS} runs")
    contenders: list[tuple[str, Callable[[], Cost]]] = []
    for ours, flags, theirs, commands in pairs:
        contenders += [(ours, partial(install, *flags)), (theirs, partial(bare, *commands))]
    series = take_turns(contenders)
    for results in series:
        print(results.row())
    for mine, other in zip(series[::2], series[1::2], strict=True):
        wall, cpu = (mine.median(of) / other.median(of) for of in ("wall", "cpu"))
        print(f"  {mine.name}: {wall:.0f} times the wall time and {cpu:.0f} times the CPU of {other.name}")


def bench_processes() -> None:
    """How many processes an install starts."""
    print("\nprocesses started, tpctl itself included (strace -f)")
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as resolv_conf:
        resolv_conf.write("nameserver 192.0.2.53\n")
        resolv_conf.flush()
        cases = {"install": (), "all DNS": ("--redirect-all-dns-traffic", "--resolv-conf", resolv_conf.name)}
        for (engine, chosen), (case, flags) in itertools.product(ENGINES.items(), cases.items()):
            started = processes(*chosen, *flags, "--no-probe")
            most = PROCESS_LIMITS.get(engine, PROCESS_LIMIT)
            limit = f"at most {most}: {verdict(started.processes <= most)}"
            count = f"{started.processes:3}, {started.programs} of them programs"
            print(f"  {f'{case} ({engine})':<46} {count}; {limit}")


def bench_start() -> None:
    """What a user waits for before anything happens."""
    heading(f"starting the command: medians of {START_RUNS} runs")
    help_, click, bare = take_turns(
        [
            ("tpctl --help", partial(timed, [TPCTL, "--help"])),
            ('python -c "import click"', partial(timed, [PYTHON, "-c", "import click"])),
            ("python -c pass", partial(timed, [PYTHON, "-c", "pass"])),
        ],
        START_RUNS,
    )
    for results in (help_, click, bare):
        print(results.row())
    ratio = help_.median("wall") / click.median("wall")
    print(f"  tpctl --help: {ratio:.2f} times import click; at most {HELP_LIMIT:g}: {verdict(ratio <= HELP_LIMIT)}")


def keep_bytecode() -> None:
    """Measure tpctl as it is once installed: nobody compiles its modules at each start (PYTHONDONTWRITEBYTECODE)."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(tpctl.__file__).parent, quiet=2)


def main() -> int:
    """Run every part."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    keep_bytecode()
    iptables = run(["iptables", "--version"]).stdout.strip()
    print(f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}, {iptables}")
    try:
        bench_install()
        bench_commands()
        bench_processes()
        bench_start()
    except AssertionError as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
