"""Streams of bytes and idle connections, for `make bench-relay`: a server, and clients that print what they measured.

    python -m tests.bench.stream serve ADDRESS PORT
    python -m tests.bench.stream upload|download ADDRESS PORT STREAMS SECONDS   prints bytes and seconds
    python -m tests.bench.stream hold ADDRESS PORT CONNECTIONS                  prints "held", waits for the end

The first byte of a connection says what it is for. Only bytes that the other side has read are counted.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import threading
import time

CHUNK = 256 * 1024
UPLOAD, DOWNLOAD, HOLD = b"u", b"d", b"h"
_DESCRIPTORS = 60_000
_TIMEOUT = 60.0
_AT_ONCE = 64


def raise_descriptor_limit() -> int:
    """Raise this process's limit as far as possible; returns it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (_DESCRIPTORS, most):
        with contextlib.suppress(ValueError):  # without CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
    return most


def _read(sock: socket.socket, end: float = float("inf")) -> int:
    """Bytes that come until the stream, or the time, ends."""
    buffer, total = bytearray(CHUNK), 0
    while count := sock.recv_into(buffer):
        total += count
        if time.monotonic() > end:
            break
    return total


def _write(sock: socket.socket, end: float = float("inf")) -> None:
    data = bytes(CHUNK)
    while time.monotonic() < end:
        sock.sendall(data)


def _serve_one(sock: socket.socket, kept: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        kind = sock.recv(1)
        if kind == HOLD:
            sock.send(HOLD)
            kept.append(sock)
            return
        with sock:
            if kind == UPLOAD:
                sock.sendall(_read(sock).to_bytes(8, "big"))
            elif kind == DOWNLOAD:
                _write(sock)


def serve(address: str, port: int) -> None:
    """Serve until killed."""
    kept: list[socket.socket] = []
    with socket.create_server((address, port), backlog=4096) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(sock, kept), daemon=True).start()


def _one_stream(kind: bytes, address: tuple[str, int], barrier: threading.Barrier, seconds: float) -> int:
    with socket.create_connection(address, timeout=_TIMEOUT) as sock:
        sock.settimeout(None)
        sock.send(kind)
        barrier.wait()
        end = time.monotonic() + seconds
        if kind == DOWNLOAD:
            return _read(sock, end)
        _write(sock, end)
        sock.shutdown(socket.SHUT_WR)
        return int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big")


def measure(kind: bytes, address: tuple[str, int], streams: int, seconds: float) -> tuple[int, float]:
    """Bytes that arrived over so many streams at once, and the seconds this took."""
    barrier = threading.Barrier(streams + 1)
    counts: list[int] = []

    def run() -> None:
        counts.append(_one_stream(kind, address, barrier, seconds))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    barrier.wait(_TIMEOUT)
    began = time.monotonic()
    for thread in threads:
        thread.join(_TIMEOUT)
    if len(counts) < streams:
        raise SystemExit("a stream has failed")
    return sum(counts), time.monotonic() - began


def hold(address: tuple[str, int], count: int) -> list[socket.socket]:
    """That many connections, over each of which a byte has gone there and back."""
    kept: list[socket.socket] = []
    while len(kept) < count:
        some = [socket.create_connection(address, timeout=_TIMEOUT) for _ in range(min(_AT_ONCE, count - len(kept)))]
        for sock in some:
            # A reset: conntrack still remembers the port of a stream that was cut off, see docs/relay.md, The pump.
            with contextlib.suppress(ConnectionResetError):
                sock.send(HOLD)
                if sock.recv(1) == HOLD:
                    kept.append(sock)
    return kept


def main() -> None:
    """Run what the arguments say."""
    raise_descriptor_limit()
    kind, host, port, *rest = sys.argv[1:]
    address = host, int(port)
    if kind == "serve":
        serve(*address)
    elif kind == "hold":
        kept = hold(address, int(rest[0]))
        print("held", flush=True)
        sys.stdin.read()
        del kept
    else:
        print(*measure({"upload": UPLOAD, "download": DOWNLOAD}[kind], address, int(rest[0]), float(rest[1])))


if __name__ == "__main__":
    main()
