"""Name servers and clients for the tests of the relay's DNS."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER4, Net, Relay

PEER_SECOND = "10.99.0.9"
"""Another address of the peer, for another name server."""
QUESTION = b"\x07example\x03com\x00\x00\x01\x00\x01"
_ANSWER = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xcb\x00\x71"
SERVFAIL = 2
PATIENT = "options timeout:30\n"
"""For a relay that waits half a minute for a name server, so that it asks no other one because a machine is busy."""
SOON = 20.0
"""Seconds: before that."""


def query(identifier: int, question: bytes = QUESTION) -> bytes:
    return identifier.to_bytes(2, "big") + b"\x01\x20\x00\x01\x00\x00\x00\x00\x00\x00" + question


def answer_to(message: bytes, last: int, *, rcode: int = 0) -> bytes:
    """An A record 203.0.113.<last>, which tells the name servers apart; without one when `rcode` is an error."""
    count = b"\x00\x00" if rcode else b"\x00\x01"
    header = message[:2] + bytes((0x81, 0x80 | rcode)) + b"\x00\x01" + count + b"\x00\x00\x00\x00"
    return header + message[12:] + (b"" if rcode else _ANSWER + bytes((last,)))


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def read_framed(sock: socket.socket) -> bytes:
    """The next message; empty at the end of the stream."""
    size = int.from_bytes(_read_exactly(sock, 2), "big")
    return _read_exactly(sock, size)


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data


class NameServer:
    """A UDP name server; `serve` gives the answers to a message, none to stay silent."""

    def __init__(self, sock: socket.socket, serve: Callable[[bytes], list[bytes]]) -> None:
        self.sock = sock
        self.sock.settimeout(None)
        self.serve = serve
        self.seen: list[tuple[int, int]] = []
        """The source port and id of each query."""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message, client = self.sock.recvfrom(4096)
                if message == b"end":
                    return
                self.seen.append((client[1], int.from_bytes(message[:2], "big")))
                for answer in self.serve(message):
                    self.sock.sendto(answer, client)

    def close(self, net: Net) -> None:
        with net.datagram(net.peer, self.sock.family) as waker:
            end = time.monotonic() + relay_net.TIMEOUT
            while self.thread.is_alive() and time.monotonic() < end:
                waker.sendto(b"end", self.sock.getsockname())  # once more where its buffer was full
                self.thread.join(0.5)  # until then the socket keeps its port
        self.sock.close()


@contextlib.contextmanager
def network() -> Iterator[Net]:
    """The two namespaces, the peer with two addresses."""
    with relay_net.network() as net:
        net.add_address(net.peer, f"{PEER_SECOND}/24")
        yield net


@contextlib.contextmanager
def name_server(net: Net, address: str, serve: Callable[[bytes], list[bytes]]) -> Iterator[NameServer]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = NameServer(net.datagram(net.peer, family, (address, 53)), serve)
    try:
        yield server
    finally:
        server.close(net)


@contextlib.contextmanager
def dnsmasq(net: Net, *options: str, address: str = PEER4) -> Iterator[None]:
    """A real name server, authoritative for what its options say."""
    argv = [
        "nsenter", f"--net=/run/netns/{net.peer}", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null",
        "--no-resolv", "--no-hosts", "--bind-interfaces", f"--listen-address={address}", "--user=root", "--pid-file",
        "--local=/test/", "--edns-packet-max=4096", *options,
    ]  # fmt: skip

    def listens() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), net.connect(net.peer, (address, 53)):
            return True
        return False

    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        relay_net.until(listens)
        yield
    finally:
        process.terminate()
        process.wait(relay_net.PATIENCE)


def readable(directory: Path, name: str, text: str) -> Path:
    """A file that the relay's user can read, unlike those in a test's own directory."""
    path = Path(f"/tmp/tpctl-test-{os.getpid()}-{directory.name}-{name}")
    path.write_text(text)
    return path


@contextlib.contextmanager
def relay_for(
    net: Net, directory: Path, *servers: str, resolv_options: str = PATIENT, options: tuple[str, ...] = ()
) -> Iterator[tuple[Path, Relay]]:
    """A relay that asks these servers, and its resolv.conf."""
    text = "".join(f"nameserver {server}\n" for server in servers) + resolv_options
    path = readable(directory, "resolv.conf", text)
    try:
        with relay_net.relay(net, directory, "--resolv-conf", str(path), *options) as relay:
            yield path, relay
    finally:
        path.unlink()


def ask(net: Net, server: str, identifier: int = 0x1234, *, patience: float = relay_net.TIMEOUT) -> bytes:
    """Ask a name server from our host; the socket is connected, so only an answer from the address asked is seen."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with net.datagram(net.host, family) as client:
        client.settimeout(patience)
        client.connect((server, 53))
        client.send(query(identifier))
        return client.recv(65535)


def drained(net: Net, name: str, port: int) -> bool:
    """Whether every query that has come to a port was read: the kernel drops those for which there is no room."""
    rows = relay_net.run("nsenter", f"--net=/run/netns/{name}", "ss", "-Hanu", f"sport = :{port}").splitlines()
    return all(row.split()[1] == "0" for row in rows)


def dig(net: Net, *arguments: str, server: str = PEER4) -> str:
    """What dig says on our host."""
    return net.on_host("dig", "+nocookie", "+tries=1", "+time=20", f"@{server}", *arguments)
