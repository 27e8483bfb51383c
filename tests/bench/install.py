"""`make bench-install`: what `tpctl install` costs beside bare iptables-restore, and what starting the command costs.

Every timed run has a network namespace of its own, made for it and gone after it; this machine's own rules are neither
read nor changed. The contenders take turns, so that a slower minute of the machine meets all of them. Nothing here is
a test of speed: the exit code is 0 unless something failed to run.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import agent
from tests.netns.lab import bare_namespace, run

RUNS = 10
PROCESS_LIMIT = 12
HELP_LIMIT = 2.0

PYTHON = sys.executable
TPCTL = str(Path(PYTHON).with_name("tpctl"))
INSTALL = (TPCTL, "install", "--kuma-dp-user", "nobody", "--exclude-inbound-ports", "22")
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


def timed(argv: Argv, text: str = "") -> Cost:
    """Run a program to its end in the current namespace. Raises AssertionError when it fails."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
        given.write(text)
        given.seek(0)
        started = time.perf_counter()
        child = subprocess.Popen(list(argv), stdin=given, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said.seek(0)
            raise AssertionError(f"{' '.join(argv)} exited with {child.returncode}:\n{said.read()}")
    return Cost(wall, used.ru_utime + used.ru_stime)


def install(variant: str) -> Cost:
    """`tpctl install` in a fresh namespace."""
    with bare_namespace() as space, space.inside():
        cost = timed([*INSTALL, "--iptables-mode", variant])
        run([TPCTL, "uninstall"])  # or the record under /run/tpctl would outlive the namespace
    return cost


def restore(variant: str, texts: Sequence[str]) -> Cost:
    """Both restore programs on the same text in a fresh namespace."""
    with bare_namespace() as space, space.inside():
        four = timed([f"iptables-{variant}-restore", "--noflush"], texts[0])
        return four + timed([f"ip6tables-{variant}-restore", "--noflush"], texts[1])


def restore_texts() -> list[str]:
    """The text of `tpctl install --dry-run`, one a family."""
    with bare_namespace() as space, space.inside():
        shown = run([*INSTALL, "--dry-run"]).stdout
    _, *texts = FAMILY_HEADING.split(shown)
    assert len(texts) == 2, f"expected the text of two families:\n{shown}"
    return texts


@dataclass(frozen=True, slots=True)
class Started:
    """What an install started, itself included."""

    processes: int
    programs: int
    """Those that executed a program; the others are forked children."""


def processes(variant: str, *flags: str) -> Started:
    """Count what one install starts, by strace(1)."""
    with bare_namespace() as space, space.inside(), tempfile.NamedTemporaryFile("r") as trace:
        tracer = ["strace", "-f", "-qq", "-e", "trace=execve,exit_group", "-e", "signal=none", "-o", trace.name]
        run([*tracer, *INSTALL, "--iptables-mode", variant, *flags])
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


def verdict(holds: bool) -> str:
    """How a limit fared."""
    return "ok" if holds else "OVER"


def bench_install() -> None:
    """Install against bare restore, in both variants."""
    texts = restore_texts()
    rules = sum(line.startswith(("-A ", "-I ")) for text in texts for line in text.splitlines())
    contenders: list[tuple[str, Callable[[], Cost]]] = []
    for variant in ("nft", "legacy"):
        contenders.append((f"tpctl install ({variant})", partial(install, variant)))
        bare = f"iptables-restore + ip6tables-restore ({variant})"
        contenders.append((bare, partial(restore, variant, texts)))
    heading(f"{' '.join(['tpctl', *INSTALL[1:]])}: {rules} rules, medians of {RUNS} runs")
    series = take_turns(contenders)
    for results in series:
        print(results.row())
    for ours, bare_series in (series[:2], series[2:]):
        wall, cpu = (ours.median(of) / bare_series.median(of) for of in ("wall", "cpu"))
        print(f"  {ours.name}: {wall:.1f} times the wall time and {cpu:.1f} times the CPU of the bare programs")


def bench_processes() -> None:
    """How many processes an install starts."""
    print("\nprocesses started, tpctl itself included (strace -f)")
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as resolv_conf:
        resolv_conf.write("nameserver 192.0.2.53\n")
        resolv_conf.flush()
        cases = (("install", ()), ("all DNS", ("--redirect-all-dns-traffic", "--resolv-conf", resolv_conf.name)))
        for variant in ("nft", "legacy"):
            for name, flags in cases:
                started = processes(variant, *flags)
                holds = verdict(started.processes <= PROCESS_LIMIT)
                print(
                    f"  {f'{name} ({variant})':<46} {started.processes:3}, {started.programs} of them programs; "
                    f"at most {PROCESS_LIMIT}: {holds}"
                )


def bench_start() -> None:
    """What a user waits for before anything happens."""
    heading(f"starting the command: medians of {2 * RUNS} runs")
    help_, click, bare = take_turns(
        [
            ("tpctl --help", partial(timed, [TPCTL, "--help"])),
            ('python -c "import click"', partial(timed, [PYTHON, "-c", "import click"])),
            ("python -c pass", partial(timed, [PYTHON, "-c", "pass"])),
        ],
        2 * RUNS,
    )
    for results in (help_, click, bare):
        print(results.row())
    ratio = help_.median("wall") / click.median("wall")
    print(f"  tpctl --help: {ratio:.2f} times import click; at most {HELP_LIMIT:g}: {verdict(ratio <= HELP_LIMIT)}")


def main() -> int:
    """Run every part."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    iptables = run(["iptables", "--version"]).stdout.strip()
    print(f"tpctl {agent.__version__}, Python {platform.python_version()}, Linux {platform.release()}, {iptables}")
    try:
        bench_install()
        bench_processes()
        bench_start()
    except AssertionError as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
