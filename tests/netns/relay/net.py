"""Two throwaway network namespaces for the relay's tests: our host, and a peer that is its client and its server.

The rules are plain iptables, those of docs/ruleset.md reduced to what the relay needs, so that a test of the relay
does not depend on an engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import pwd
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.hidden import anybodys_python

CLONE_NEWNET = 0x40000000
RELAY_USER = "nobody"
RELAY_UID = 65534
PEER4, HOST4 = "10.99.0.1", "10.99.0.2"
PEER6, HOST6 = "fd99::1", "fd99::2"
PEER = {socket.AF_INET: PEER4, socket.AF_INET6: PEER6}
HOST = {socket.AF_INET: HOST4, socket.AF_INET6: HOST6}
LIBC = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()
Service = Callable[[socket.socket, Any], None]
_EVERY_PROTOCOL = 3
"""ETH_P_ALL (linux/if_ether.h)."""
TIMEOUT = 30.0
"""For each answer, on a busy machine."""
PATIENCE = 60.0
"""For what a relay does by itself: to begin, with the kernel's program compiled first, takes long on a busy machine."""


def run(*argv: str, stdin: str | None = None) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done.stdout


def until(condition: Callable[[], object]) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def has_address(host: str, *where: str) -> bool:
    """Whether an address can be bound, by options of ip(8): a new one of IPv6, and its own route, come by and by."""
    family = "-6" if ":" in host else "-4"
    return f"local {host} " in run("ip", *where, family, "route", "show", "table", "local")


def hearing(interface: str, kind: socket.SocketKind) -> socket.socket:
    """A packet socket of an interface. One made for a protocol hears all interfaces until it is bound (packet(7))."""
    made = socket.socket(socket.AF_PACKET, kind, 0)
    made.bind((interface, _EVERY_PROTOCOL))
    return made


def rules(family: int) -> str:
    """The redirection of one family, for iptables-restore.

    With the zones of docs/ruleset.md: the relay asks from ports of which conntrack remembers for half a minute that
    their queries pass, and an application may have one of them next.
    """
    local, passthrough = ("127.0.0.1/32", "127.0.0.6/32") if family == 4 else ("::1/128", "::6/128")
    return f"""*raw
-A OUTPUT -p udp --dport 53 -m owner --uid-owner {RELAY_UID} -j CT --zone 1
-A OUTPUT -p udp --sport 15053 -m owner --uid-owner {RELAY_UID} -j CT --zone 2
-A OUTPUT -p udp --dport 53 -m owner ! --uid-owner {RELAY_UID} -j CT --zone 2
-A PREROUTING -p udp --sport 53 -j CT --zone 1
COMMIT
*nat
-A PREROUTING -p tcp -j REDIRECT --to-ports 15006
-A OUTPUT -p udp --dport 53 -m owner --uid-owner {RELAY_UID} -j RETURN
-A OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053
-A OUTPUT -p tcp --dport 53 -m owner ! --uid-owner {RELAY_UID} -j REDIRECT --to-ports 15053
-A OUTPUT -p tcp -o lo -s {passthrough} -j RETURN
-A OUTPUT -p tcp -o lo ! -d {local} -m owner --uid-owner {RELAY_UID} -j REDIRECT --to-ports 15006
-A OUTPUT -p tcp -o lo -m owner ! --uid-owner {RELAY_UID} -j RETURN
-A OUTPUT -p tcp -m owner --uid-owner {RELAY_UID} -j RETURN
-A OUTPUT -p tcp -d {local} -j RETURN
-A OUTPUT -p tcp -j REDIRECT --to-ports 15001
COMMIT
"""


class Net:
    """The two namespaces. Sockets opened `inside` one stay there, whoever uses them."""

    def __init__(self) -> None:
        unique = f"{os.getpid()}-{next(_numbers)}"
        self.host = f"relay-host-{unique}"
        self.peer = f"relay-peer-{unique}"

    def create(self, *, redirect: bool = True, passthrough6: bool = True) -> None:
        """Make them; `redirect` adds `rules`, `passthrough6` the address ::6 on lo."""
        for name in (self.host, self.peer):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            # Duplicate address detection keeps a new IPv6 address from being bound for a second or two. And of errors,
            # the kernel sends one a second to a host: who waits for the second one would wait in vain.
            run("nsenter", f"--net=/run/netns/{name}", "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0",
                "net.ipv4.icmp_ratemask=0", "net.ipv6.icmp.ratelimit=0")  # fmt: skip
        run("ip", "-n", self.host, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.peer)
        for name, v4, v6 in ((self.host, HOST4, HOST6), (self.peer, PEER4, PEER6)):
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "addr", "add", f"{v4}/24", "dev", "eth0")
            run("ip", "-n", name, "-6", "addr", "add", f"{v6}/64", "dev", "eth0")
        # The kernel learns later that there is somebody at the other end: until then packets are lost, and routes shown
        # as those of a dead link.
        for name in (self.host, self.peer):
            until(lambda: " state UP " in run("ip", "-n", name, "link", "show", "eth0"))  # noqa: B023 - asked at once
        for name, address in ((self.host, HOST6), (self.peer, PEER6)):
            until(lambda: has_address(address, "-n", name))  # noqa: B023
        if passthrough6:
            self.add_address(self.host, "::6/128", "lo")
        if redirect:
            self.restore(4, rules(4))
            self.restore(6, rules(6))

    def add_address(self, name: str, address: str, device: str = "eth0", *options: str) -> None:
        """Give a namespace another address, for use at once."""
        run("ip", "-n", name, "address", "add", address, "dev", device, *options)
        until(lambda: has_address(address.partition("/")[0], "-n", name))

    def restore(self, family: int, text: str) -> None:
        """Give our host's nat table rules."""
        self.on_host("iptables-restore" if family == 4 else "ip6tables-restore", "-w", "60", stdin=text)

    def hand_over_by_tproxy(self, *ports: int) -> None:
        """What arrives on eth0 for ports is given to the listener; answers to its dials are brought back to it."""
        self.on_host("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.lo.rp_filter=0")
        listed = ("-p", "tcp", "-m", "multiport")
        arrives = ("-i", "eth0", *listed, "--dports", ",".join(map(str, ports)))
        answers = (*listed, "--sports", ",".join(map(str, ports)), "-m", "owner", "--uid-owner", "0")
        tproxy = ("-j", "TPROXY", "--on-port", "15006", "--tproxy-mark", "1")
        for family, tables in (("-4", "iptables"), ("-6", "ip6tables")):
            self.on_host(tables, "-w", "-t", "mangle", "-A", "PREROUTING", *arrives, *tproxy)
            self.on_host(tables, "-w", "-t", "mangle", "-A", "OUTPUT", *answers, "-j", "MARK", "--set-mark", "1")
            self.on_host("ip", family, "rule", "add", "fwmark", "1", "lookup", "100")
            self.on_host("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "100")

    def on_host(self, *argv: str, stdin: str | None = None) -> str:
        """Run a command on our host."""
        return run("nsenter", f"--net=/run/netns/{self.host}", *argv, stdin=stdin)

    def remove(self) -> None:
        """Remove them."""
        for name in (self.host, self.peer):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=120, check=False)

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """The calling thread's new sockets belong to the namespace."""
        with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{name}").open() as target:
            assert LIBC.setns(target.fileno(), CLONE_NEWNET) == 0
            try:
                yield
            finally:
                assert LIBC.setns(home.fileno(), CLONE_NEWNET) == 0

    def connect(self, name: str, address: tuple[str, int], source: str | None = None) -> socket.socket:
        """A connection from a namespace."""
        with self.inside(name):
            return socket.create_connection(address, timeout=TIMEOUT, source_address=(source, 0) if source else None)

    def listen(self, name: str, address: tuple[str, int]) -> socket.socket:
        """A listening socket in a namespace."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with self.inside(name):
            return socket.create_server(address, family=family, backlog=1024)

    def datagram(
        self, name: str, family: socket.AddressFamily, address: tuple[str, int] | None = None
    ) -> socket.socket:
        """A UDP socket in a namespace."""
        with self.inside(name):
            sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.settimeout(TIMEOUT)
        try:
            if address is not None:
                sock.bind(address)
        except OSError:
            sock.close()
            raise
        return sock


@contextlib.contextmanager
def network(*, redirect: bool = True, passthrough6: bool = True) -> Iterator[Net]:
    """Namespaces for a block; see `Net.create`."""
    made = Net()
    try:
        made.create(redirect=redirect, passthrough6=passthrough6)
        yield made
    finally:
        made.remove()


def process_status(pid: int | str) -> dict[str, str]:
    """What the kernel says of a process; proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that has, and that nobody has waited for, is still listed.

    Its first thread may be over, as if that were all, while others still keep its sockets: one that has been writing to
    a stalled pipe, for instance, and that nobody has given a processor yet.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if process_status(f"{pid}/task/{thread.name}")["State"][0] not in "ZX":
                    return True
    return False


class Server:
    """Serves each connection of a listener in a thread of its own."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket, Any], None]) -> None:
        self._listener = listener
        self._serve = serve
        self.peers: list[Any] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            client.settimeout(TIMEOUT)
            threading.Thread(target=self._one, args=(client, peer), daemon=True).start()

    def _one(self, client: socket.socket, peer: Any) -> None:
        with contextlib.suppress(OSError), client:
            self._serve(client, peer)

    def close(self) -> None:
        """Stop accepting."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def say_who(name: str) -> Callable[[socket.socket, Any], None]:
    """A service that tells its name, the client's address and the address that was dialled."""

    def serve(client: socket.socket, peer: Any) -> None:
        client.sendall(json.dumps([name, peer[0], client.getsockname()[0], client.getsockname()[1]]).encode())

    return serve


def echo(client: socket.socket, _peer: Any) -> None:
    """A service that returns what it is sent, and ends when the client does."""
    while data := client.recv(65536):
        client.sendall(data)


def digest_service(size: int) -> Callable[[socket.socket, Any], None]:
    """A service that reads to the end, then sends the digest of what came and `size` bytes of its own."""

    def serve(client: socket.socket, _peer: Any) -> None:
        client.sendall(read_digest(client) + pattern(size))

    return serve


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that the relay's user may read, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="tpctl-relay-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def for_the_relay(file: Path) -> None:
    """Let the relay's user read a file of root's, and nobody else, as a private key has to be."""
    os.chown(file, 0, pwd.getpwnam(RELAY_USER).pw_gid)
    file.chmod(0o640)


def pattern(size: int) -> bytes:
    """Bytes in which a lost, doubled or moved block changes the digest."""
    block = b"".join(number.to_bytes(4, "big") for number in range(16384))
    return (block * (size // len(block) + 1))[:size]


def read_digest(sock: socket.socket) -> bytes:
    """The digest of everything up to the end of the stream."""
    total = hashlib.sha256()
    while data := sock.recv(1 << 20):
        total.update(data)
    return total.digest()


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


class Relay:
    """A `tpctl relay` on our host."""

    def __init__(
        self,
        net: Net,
        directory: Path,
        *options: str,
        user: str | None = RELAY_USER,
        prefix: Sequence[str] = (),
        close_fds: bool = True,
    ) -> None:
        self._log = directory / f"relay-{next(_numbers)}.log"
        python, environment = anybodys_python()
        argv = [python, "-m", "tpctl.cli.main", "relay", "--log-format", "json", *options]
        if user is not None:
            argv += ["--user", user]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{net.host}", *prefix, *argv],
                stderr=log, close_fds=close_fds, env=environment,
            )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        whole, _, _ = self._log.read_text().rpartition("\n")  # the rest is being written: a write shows page by page
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def log_text(self) -> str:
        """All that it has written."""
        return self._log.read_text()

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """The first log line that begins with `event` and has these fields."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            has_ended = self.process.poll() is not None  # asked first: it may say something and end
            for line in self.lines():
                if str(line["event"]).startswith(event) and fields.items() <= line.items():
                    return line
            if has_ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"no log line {event!r} in: {self._log.read_text()}")

    def workers(self) -> list[int]:
        """Its children."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def have_begun(self) -> bool:
        """Whether its workers have shown that they live: only then do they take signals, which they inherit blocked."""
        blocked = [int(process_status(pid)["SigBlk"], 16) for pid in self.workers()]
        return not any(mask & 1 << (signal.SIGTERM - 1) for mask in blocked)

    def exit_code(self) -> int:
        """Of one that ends by itself. One that does not is killed with its workers, which would keep the sockets."""
        try:
            return self.process.wait(PATIENCE)
        except BaseException:
            workers = self.workers() if self.process.poll() is None else []
            self.process.kill()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            until(lambda: not any(is_running(pid) for pid in workers))
            raise

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.exit_code()


@contextlib.contextmanager
def relay(
    net: Net, directory: Path, *options: str, user: str | None = RELAY_USER, prefix: Sequence[str] = ()
) -> Iterator[Relay]:
    """A relay that is ready, and that has not failed in the end."""
    running = Relay(net, directory, "--drain-timeout", "0.2", *options, user=user, prefix=prefix)
    try:
        running.wait_for("ready")
        yield running
    finally:
        code = running.stop()
    assert code == 0, running.lines()
