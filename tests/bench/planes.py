"""The data planes of `make bench-relay`, each as its users would run it: a worker for every processor, tuned alike."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.stream import raise_descriptor_limit
from tests.bench.wrk import PORT, START_SECONDS, inside
from tests.netns.envoy.scene import running as envoy_by_tpctl
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER, RELAY_USER, Net
from tests.netns.test_envoy import running_envoy

STREAM_PORT = 9000
OUTBOUND, OTHER = 15001, 15002
WORKERS = os.cpu_count() or 1
SERVER = PEER[socket.AF_INET]

HAPROXY = f"""
global
    maxconn {(raise_descriptor_limit() - 800) // 2}
    maxpipes 256
    nbthread {WORKERS}
    user {RELAY_USER}
    group nogroup
defaults
    mode tcp
    option splice-auto
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen outbound
    bind *:{OUTBOUND}
    option transparent
"""
"""Asks for the original destination (option transparent), and splices."""

_BY_TPCTL = f"""
workers: {WORKERS}
listeners:
  - {{listen: "[::]:15006 ipv6only=off", direction: inbound}}
  - {{listen: "[::]:15001 ipv6only=off", direction: outbound, services: [SERVICES]}}
"""
BY_TPCTL = {
    "envoy-tcp": _BY_TPCTL.replace("SERVICES", ""),
    "envoy-http": _BY_TPCTL.replace("SERVICES", f"{{port: {PORT}, protocol: http}}"),
}
"""Files for Envoy. They pass everything on; with the second, requests are read."""

NGINX = f"""
load_module modules/ngx_stream_module.so;
daemon off; pid {{folder}}/nginx-stream.pid; error_log stderr crit; user {RELAY_USER} nogroup;
worker_processes {WORKERS};
events {{{{ worker_connections 32768; multi_accept on; }}}}
stream {{{{
    access_log off; tcp_nodelay on; proxy_timeout 1h; proxy_half_close on;
    server {{{{ listen {OUTBOUND} reuseport backlog=4096; proxy_pass {SERVER}:{PORT}; }}}}
    server {{{{ listen {OTHER} reuseport backlog=4096; proxy_pass {SERVER}:{STREAM_PORT}; }}}}
}}}}
"""
"""Cannot ask for the original destination: it has a fixed upstream for each of the two ports."""
NGINX_RULE = f"OUTPUT 1 -p tcp -d {SERVER} --dport {STREAM_PORT} -m owner --uid-owner 0 -j REDIRECT --to-ports {OTHER}"


@contextlib.contextmanager
def process(net: Net, *argv: str, port: int = OUTBOUND, space: str | None = None) -> Iterator[None]:
    """A program that listens on a port, on our host or in another namespace."""
    space = space or net.host
    running = subprocess.Popen([*inside(space), *argv], stdout=subprocess.DEVNULL)
    try:
        wait_for_listener(space, port, running)
        yield
    finally:
        running.terminate()
        try:
            running.wait(START_SECONDS)
        finally:
            running.kill()


def wait_for_listener(name: str, port: int, running: subprocess.Popen[bytes]) -> None:
    """Return when somebody listens on a port in a namespace. Raises AssertionError when the program has ended."""
    end = time.monotonic() + START_SECONDS
    while not relay_net.run(*inside(name), "ss", "-Hltn", f"( sport = :{port} )"):
        if running.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"nobody listens on port {port}")
        time.sleep(0.02)


@contextlib.contextmanager
def plane(net: Net, name: str, folder: Path) -> Iterator[None]:
    """A data plane on our host, as the user whose connections are not redirected."""
    with contextlib.ExitStack() as stack:
        if name in ("relay", "sockmap"):
            accelerate = name if name == "sockmap" else "off"
            options = ("--workers", str(WORKERS), "--accelerate", accelerate)
            stack.enter_context(relay_net.relay(net, folder, *options))
        elif name == "envoy":
            stack.enter_context(running_envoy(net, folder / "envoy.log", concurrency=WORKERS))
        elif name in BY_TPCTL:
            stack.enter_context(envoy_by_tpctl(net, folder, BY_TPCTL[name]))
        elif name == "haproxy":
            configuration = folder / "haproxy.cfg"
            configuration.write_text(HAPROXY)
            stack.enter_context(process(net, "haproxy", "-db", "-q", "-f", str(configuration)))
        elif name == "nginx":
            configuration = folder / "nginx-stream.conf"
            configuration.write_text(NGINX.format(folder=folder))
            net.on_host("iptables", "-t", "nat", "-I", *NGINX_RULE.split())
            argv = ("nginx", "-e", "stderr", "-p", "/usr/share/nginx", "-c", str(configuration))
            stack.enter_context(process(net, *argv))
        yield
