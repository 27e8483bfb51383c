"""wrk asks nginx, from one namespace to another: the load of `make bench-engines`."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, Net
from tpctl.rehearsal.cgroup import enter

CONNECTIONS = 32
"""Open at a time: enough that nobody waits for the client."""
PORT = 8080
START_SECONDS = 10.0

SERVER = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 4096; multi_accept on; }}
http {{
    access_log off; keepalive_requests 1000000000; client_body_temp_path {folder};
    server {{
        listen {address}:{port} backlog=4096;
        location / {{ return 200 "ok"; }}
        location /who {{ return 200 "$remote_addr $remote_port"; }}
    }}
}}
"""
REPORT = """
done = function(summary, latency)
    local e = summary.errors
    io.write(string.format("figures %d %d %d %f %f\\n", summary.requests, summary.duration,
        e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the clients do, and how often a round measures it (for a second)."""

    new: bool
    inbound: bool
    slices: int

    @property
    def name(self) -> str:
        """For people."""
        kind = "new connections" if self.new else "keep-alive requests"
        return f"{kind}, {'inbound' if self.inbound else 'outbound'}"

    @property
    def unit(self) -> str:
        """What a rate counts."""
        return "connections/s" if self.new else "requests/s"


WORKLOADS = (Workload(True, False, 2), Workload(True, True, 2), Workload(False, False, 1), Workload(False, True, 1))


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands ready to be measured; all its processes are in one cgroup."""

    net: Net
    cgroup: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement: how many a second; CPU seconds of each; seconds below which half and 99 of 100 stay."""

    rate: float
    cpu: float
    median: float
    slow: float


def inside(name: str) -> tuple[str, ...]:
    """The beginning of a command that is to run in a namespace."""
    return "nsenter", f"--net=/run/netns/{name}"


@contextlib.contextmanager
def server(net: Net, name: str, address: str, folder: Path) -> Iterator[None]:
    """nginx in a namespace, one process."""
    folder.mkdir()
    configuration = folder / "nginx.conf"
    configuration.write_text(SERVER.format(folder=folder, address=address, port=PORT))
    argv = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(configuration)]
    process = subprocess.Popen([*inside(name), *argv])
    try:
        end = time.monotonic() + START_SECONDS
        while not relay_net.run(*inside(name), "ss", "-Hltn", f"( sport = :{PORT} )"):
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError("nginx does not listen")
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_SECONDS)


def used_seconds(cgroup: Path) -> float:
    """CPU time of everything in a cgroup."""
    fields = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6


def measure(at: Standing, workload: Workload) -> Figures:
    """One measurement. Raises AssertionError when a request failed."""
    name, address = (at.net.peer, HOST) if workload.inbound else (at.net.host, PEER)
    script = at.folder / "report.lua"
    script.write_text(REPORT)
    headers = ("-H", "Connection: close") if workload.new else ()
    url = f"http://{address[socket.AF_INET]}:{PORT}/"
    enter(at.cgroup)
    before = used_seconds(at.cgroup)
    said = relay_net.run(*inside(name), "wrk", "-t1", f"-c{CONNECTIONS}", "-d1s", "-s", str(script), *headers, url)
    used = used_seconds(at.cgroup) - before
    line = next(line for line in said.splitlines() if line.startswith("figures "))
    requests, duration, errors, median, slow = (float(word) for word in line.split()[1:])
    if errors:
        raise AssertionError(f"{workload.name}: {errors:.0f} of {requests:.0f} requests failed:\n{said}")
    return Figures(requests / duration * 1e6, used / requests, median / 1e6, slow / 1e6)
