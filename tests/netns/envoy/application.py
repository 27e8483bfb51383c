"""An application behind Envoy that tells what reached it."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from tests.netns.relay.net import Net, Server, Service

PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"


class Asked(dict[str, Any]):
    """A request as the application saw it."""

    def header(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self["headers"] if key.lower() == name.lower()]


def answer_http(client: socket.socket, peer: Any) -> None:
    """Answer each request with what it was; a WebSocket's bytes come back as they are.

    The path /?wait=SECONDS is answered after that time, and /?bytes=NUMBER with so many.
    """
    stream = client.makefile("rb")
    local = client.getsockname()
    common: dict[str, Any] = {"peer": peer[0], "local": [local[0], local[1]], "proxy": _proxy_header(stream)}
    if isinstance(client, ssl.SSLSocket):
        certificate: dict[str, Any] = client.getpeercert() or {}
        common["client_certificate"] = dict(one[0] for one in certificate.get("subject", ()))
    while True:
        line = stream.readline().decode("latin-1")
        if not line:
            return
        headers = []
        while (text := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = text.partition(":")
            headers.append([name, value.strip()])
        asked = Asked({**common, "line": line.strip(), "headers": headers})
        if "websocket" in asked.header("upgrade"):
            client.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            while data := stream.read1(65536):
                client.sendall(data)
            return
        asked["length"] = _skip_body(stream, asked)
        if "?wait=" in line:
            time.sleep(float(line.split()[1].partition("=")[2]))
        if "?bytes=" in line:
            _send_zeros(client, int(line.split()[1].partition("=")[2]))
            continue
        body = json.dumps(asked).encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if "close" in asked.header("connection"):
            return


def _send_zeros(client: socket.socket, count: int) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % count)
    block = bytes(1 << 20)
    while count:
        count -= client.send(block[:count])


def _skip_body(stream: BufferedReader, asked: Asked) -> int:
    if "chunked" not in asked.header("transfer-encoding"):
        return _read_away(stream, int((asked.header("content-length") or ["0"])[0]))
    total = 0
    while size := int(stream.readline().split(b";")[0], 16):
        total += len(stream.read(size))
        stream.readline()
    stream.readline()
    return total


def _read_away(stream: BufferedReader, count: int) -> int:
    left = count
    while left and (data := stream.read(min(left, 1 << 20))):
        left -= len(data)
    return count - left


def _proxy_header(stream: BufferedReader) -> str | None:
    """A PROXY protocol header before everything else: version 1 as it is, version 2 as its addresses and ports."""
    first = stream.peek(1)[:1]
    if first == b"\r":
        assert stream.read(12) == PROXY_V2
        _, family, high, low = stream.read(4)
        data = stream.read(high << 8 | low)
        size = 4 if family >> 4 == 1 else 16
        kind = socket.AF_INET if size == 4 else socket.AF_INET6
        source, destination = (socket.inet_ntop(kind, data[at : at + size]) for at in (0, size))
        return f"v2 {source} {destination} {int.from_bytes(data[2 * size + 2 : 2 * size + 4])}"
    if stream.peek(6)[:6] == b"PROXY ":
        return stream.readline().decode().strip()
    return None


def greet(client: socket.socket, peer: Any) -> None:
    """A server that speaks first, as for SMTP, and then returns what it is sent."""
    client.sendall(b"220 hello\r\n")
    while data := client.recv(65536):
        client.sendall(data)


def send_file(path: Path) -> Service:
    """A web server with one file."""

    def serve(client: socket.socket, _peer: Any) -> None:
        stream = client.makefile("rb")
        while line := stream.readline():
            while stream.readline().strip():
                pass
            content = path.read_bytes() if f" /{path.name} ".encode() in line else b""
            status = b"200 OK" if content else b"404 Not Found"
            client.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(content)) + content)

    return serve


def over_tls(context: ssl.SSLContext, serve: Service) -> Service:
    """The same behind TLS."""

    def wrapped(client: socket.socket, peer: Any) -> None:
        with contextlib.suppress(ssl.SSLError), context.wrap_socket(client, server_side=True) as inner:
            serve(inner, peer)

    return wrapped


@contextlib.contextmanager
def serving(net: Net, where: str, port: int, serve: Service, *hosts: str) -> Iterator[list[Server]]:
    """A server on one port of a namespace, at some addresses or all."""
    servers = [Server(net.listen(where, (host, port)), serve) for host in hosts or ("0.0.0.0", "::")]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
