"""Transfers that last for as long as a test wants."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

SIZE = 50_000_000
_CHUNK = 65536
_UNHURRIED = 0.9
"""The last tenth waits for `finish`, whatever happens meanwhile."""
_PATIENCE_SECONDS = 240.0


def content() -> bytes:
    """What is transferred: does not repeat within a chunk."""
    block = b"".join(number.to_bytes(4, "big") for number in range(_CHUNK))
    return (block * (SIZE // len(block) + 1))[:SIZE]


class Transfer(threading.Thread):
    """Moves `SIZE` bytes over a connection slowly, then quickly once `finish` is called. Use as a context manager."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.moved = 0
        self.failure: Exception | None = None
        self._hurry = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hurry.set()

    def finish(self) -> None:
        """Let the rest through. AssertionError unless everything arrives."""
        assert self.is_alive(), f"it ended before its time, after {self.moved} bytes: {self.failure}"
        self._hurry.set()
        self.join(_PATIENCE_SECONDS)
        assert self.failure is None, f"after {self.moved} bytes: {self.failure}"
        assert self.moved == SIZE

    def run(self) -> None:
        """Move, and remember what went wrong."""
        try:
            self.move()
        except (OSError, AssertionError) as error:
            self.failure = error

    def move(self) -> None:
        """Move everything over the connection."""
        raise NotImplementedError

    def pace(self, count: int) -> None:
        """Say that so many bytes were moved, and wait a little."""
        self.moved += count
        if self.moved > _UNHURRIED * SIZE:
            self._hurry.wait(_PATIENCE_SECONDS)
        elif not self._hurry.is_set():
            time.sleep(0.02)


class Download(Transfer):
    """Reads from a port of 127.0.0.1 and compares with `content`."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def move(self) -> None:
        """Read to the end."""
        digest = hashlib.sha256()
        with socket.create_connection(("127.0.0.1", self.port), _PATIENCE_SECONDS) as made:
            while block := made.recv(_CHUNK):
                digest.update(block)
                self.pace(len(block))
        assert digest.digest() == hashlib.sha256(content()).digest()


class Upload(Transfer):
    """Listens on a port of 127.0.0.1 and sends `content` to the one who comes."""

    def __init__(self) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        """Where it listens."""

    def move(self) -> None:
        """Send everything."""
        data = memoryview(content())
        with self.listener:
            self.listener.settimeout(_PATIENCE_SECONDS)
            made, _ = self.listener.accept()
        with made:
            for start in range(0, SIZE, _CHUNK):
                block = data[start : start + _CHUNK]
                made.sendall(block)
                self.pace(len(block))
