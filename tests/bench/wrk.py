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

from tests.netns import relay_net
from tests.netns.ebpf_place import OwnPlace
from tests.netns.relay_net import HOST, PEER, Net

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
    """What the clients do."""

    name: str
    unit: str
    inbound: bool
    headers: tuple[str, ...]
    seconds: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement: how many a second; CPU seconds of each; seconds below which half and 99 of 100 stay."""

    rate: float
    cpu: float
    median: float
    slow: float


def workloads(new_seconds: int, kept_seconds: int) -> tuple[Workload, ...]:
    """New connections and kept ones, in both directions."""
    return tuple(
        Workload(f"{name}, {'inbound' if inbound else 'outbound'}", unit, inbound, headers, seconds)
        for name, unit, headers, seconds in (
            ("new connections", "connections/s", ("-H", "Connection: close"), new_seconds),
            ("keep-alive requests", "requests/s", (), kept_seconds),
        )
        for inbound in (False, True)
    )


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


def used_seconds(place: OwnPlace) -> float:
    """CPU time of everything in the cgroup."""
    fields = dict(line.split() for line in (place.cgroup / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6


def measure(net: Net, workload: Workload, place: OwnPlace, folder: Path) -> Figures:
    """One measurement. Raises AssertionError when a request failed."""
    name, address = (net.peer, HOST) if workload.inbound else (net.host, PEER)
    script = folder / "report.lua"
    script.write_text(REPORT)
    url = f"http://{address[socket.AF_INET]}:{PORT}/"
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{workload.seconds}s", "-s", str(script), *workload.headers, url]
    before = used_seconds(place)
    said = relay_net.run(*inside(name), *argv)
    used = used_seconds(place) - before
    line = next(line for line in said.splitlines() if line.startswith("figures "))
    requests, duration, errors, median, slow = (float(word) for word in line.split()[1:])
    if errors:
        raise AssertionError(f"{workload.name}: {errors:.0f} of {requests:.0f} requests failed:\n{said}")
    return Figures(requests / duration * 1e6, used / requests, median / 1e6, slow / 1e6)
