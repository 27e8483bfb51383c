"""`make bench-relay`: the relay beside HAProxy, Envoy, nginx stream, and no proxy at all.

An application on our host talks to a server on another one, over a veth pair. Its connections are redirected by the
same iptables rule to each data plane in turn, which has a worker for every processor. Client, data plane and server
share the machine, so that rates follow from what everybody's work costs together; the data plane's own CPU time is
that of its control group, and hardly depends on who else uses the machine. It contains what the kernel does on behalf
of its processes. The CPU time of everybody, client and servers too, tells what the rate would be on a machine that is
left alone: it is what the processors are full of then.

Each round has fresh namespaces and fresh data planes, all ready at once, and they take turns of a second or two, there
and back again, so that a slower minute of the machine meets all of them. The tables have the median over the rounds and
the lowest and highest; a ratio compares the relay with a peer a few seconds earlier or later. Nothing here is a test of
speed: the exit code is 0 unless something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tpctl
from tests.bench import relay_report
from tests.bench.engines import SYSCTLS, progress
from tests.bench.planes import SERVER, STREAM_PORT, plane, wait_for_listener
from tests.bench.relay_report import CELLS, ON_REQUEST, PLANES, Cell, Figures, Results
from tests.bench.stream import raise_descriptor_limit
from tests.bench.wrk import PORT, REPORT, inside, server, used_seconds
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import Net
from tpctl.rehearsal.cgroup import enter, own_groups
from tpctl.rehearsal.namespaces import write_sysctls
from tpctl.system.errors import TpctlError

ROUNDS = 3
SECONDS = 2
BULK_SECONDS = 1.0
IDLE = 10_000
_SPARE_DESCRIPTORS = 1000


@dataclass(frozen=True, slots=True)
class Standing:
    """A data plane that stands ready to be measured, alone in a control group."""

    net: Net
    cgroup: Path
    folder: Path

    @property
    def processes(self) -> list[int]:
        """The data plane's."""
        return [int(line) for line in (self.cgroup / "cgroup.procs").read_text().split()]


@contextlib.contextmanager
def standing(name: str, home: Path) -> Iterator[Standing]:
    """Its namespaces, redirection, data plane and servers, for the length of the block."""
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
        enter(cgroup)
        try:
            stack.enter_context(plane(net, name, folder))
        finally:
            enter(home)
        stack.enter_context(server(net, net.peer, SERVER, folder / "peer"))
        stack.enter_context(stream_server(net))
        yield Standing(net, cgroup, folder)


@contextlib.contextmanager
def stream_server(net: Net) -> Iterator[None]:
    """The counterpart of `stream`."""
    process = subprocess.Popen([*stream(net.peer, "serve")])
    try:
        wait_for_listener(net.peer, STREAM_PORT, process)
        yield
    finally:
        process.kill()
        process.wait()


def stream(name: str, kind: str, *arguments: object) -> list[str]:
    """The command line of `tests.bench.stream` in a namespace."""
    program = [sys.executable, "-m", "tests.bench.stream", kind, SERVER, str(STREAM_PORT)]
    return [*inside(name), *program, *map(str, arguments)]


def measure(at: Standing, cell: Cell, seconds: int) -> Figures:
    """One measurement. Raises AssertionError when something failed."""
    if cell.streams:
        said, own, everybody = used_by(at, *stream(at.net.host, cell.direction, cell.streams, BULK_SECONDS))
        count, took = (float(word) for word in said.split())
        return Figures(count * 8 / took / 1e9, own / count * 1e12, everybody / count * 1e12)
    script = at.folder / "report.lua"
    script.write_text(REPORT)
    headers = ("-H", "Connection: close") if cell.new else ()
    arguments = ("-t1", f"-c{cell.connections}", f"-d{seconds}s", "-s", str(script))
    argv = (*inside(at.net.host), "wrk", *arguments, *headers, f"http://{SERVER}:{PORT}/")
    said, own, everybody = used_by(at, *argv)
    line = next(line for line in said.splitlines() if line.startswith("figures "))
    requests, duration, errors, median, slow = (float(word) for word in line.split()[1:])
    if errors:
        raise AssertionError(f"{cell.name}: {errors:.0f} of {requests:.0f} requests failed:\n{said}")
    each = 1e6 / requests
    return Figures(requests / duration * 1e6, own * each, everybody * each, median / 1e3, slow / 1e3)


def used_by(at: Standing, *argv: str) -> tuple[str, float, float]:
    """What a client says, and the CPU seconds meanwhile of the data plane, and of everybody who had to do with it."""
    groups = (at.cgroup, at.cgroup.parent)
    before = [used_seconds(group) for group in groups]
    said = relay_net.run(*argv)
    own, everybody = (used_seconds(group) - used for group, used in zip(groups, before, strict=True))
    return said, own, everybody


def memory(at: Standing) -> float:
    """Megabytes of the data plane's processes: what is shared is divided (PSS)."""
    total = 0
    for pid in at.processes:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def told(folder: Path) -> str:
    """The end of what a data plane has logged."""
    return "".join(path.read_text()[-1000:] for path in folder.glob("*.log"))


def measure_memory(at: Standing, count: int) -> tuple[float, float]:
    """Its megabytes before and while it holds so many idle connections."""
    before = memory(at)
    process = subprocess.Popen(stream(at.net.host, "hold", count), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"held\n":
            raise AssertionError(f"{count} connections could not be held: {told(at.folder)}")
        return before, memory(at)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def measure_round(home: Path, results: Results, options: argparse.Namespace, *, with_memory: bool) -> None:
    """Everything once, or there and back again."""
    with contextlib.ExitStack() as stack:
        ready = [(name, stack.enter_context(standing(name, home))) for name in options.planes]
        for cell in options.cells:
            for name, at in ready:
                progress(f"{name}: {cell.name}")
                results.add(name, cell, measure(at, cell, options.seconds))
            ready.reverse()
        if with_memory:
            for name, at in ready:
                if name != "none":
                    progress(f"{name}: {options.idle} idle connections")
                    try:
                        results.memory[name] = measure_memory(at, options.idle)
                    except AssertionError as failed:
                        print(f"{name}: {failed}", file=sys.stderr)
    progress("")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each wrk (default: %(default)s)")
    parser.add_argument("--idle", type=int, default=IDLE, help="connections; 0: do not measure memory")
    parser.add_argument("--planes", nargs="+", choices=(*PLANES, *ON_REQUEST), default=PLANES)
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    parser.add_argument("--picture", type=Path, help="write an SVG file")
    options = parser.parse_args(arguments)
    options.cells = [cell for cell in CELLS if options.only in cell.name]
    return options


def main() -> int:
    """Run it."""
    options = parse()
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    # HAProxy and Envoy hold both ends of every connection in one process.
    options.idle = min(options.idle, (raise_descriptor_limit() - _SPARE_DESCRIPTORS) // 2)
    versions = f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}"
    print(f"{versions}, {os.cpu_count()} processors; {options.rounds} rounds")
    started, results = time.monotonic(), Results()
    try:
        with own_groups() as groups:
            for number in range(options.rounds):
                last = number == options.rounds - 1
                measure_round(groups.home, results, options, with_memory=last and options.idle > 0)
    except (AssertionError, OSError, TpctlError, subprocess.SubprocessError) as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    relay_report.show(results, options.cells, options.idle)
    if options.picture:
        relay_report.draw(results, options.picture, f"{versions}, {os.cpu_count()} processors")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
