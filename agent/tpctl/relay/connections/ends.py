"""Ends of a connection that is not spliced from socket to socket: plain, or with TLS between socket and relay.

OpenSSL works on memory here (SSLObject), not on the socket: so one direction can be closed while the other goes on.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Protocol

from tpctl.relay.connections.pump import end_stream
from tpctl.relay.connections.tls import ChainTooLongError, Tls, check_depth
from tpctl.relay.loop.bare_socket import Socket

_CHUNK = 64 * 1024
_RECORD = 16 * 1024
"""The most that a record of TLS carries (RFC 8446, 5.1). A memory BIO grows to the most that it ever held and a third
more, and never shrinks (crypto/buffer/buffer.c, BUF_MEM_grow_clean), so nothing larger passes through one. With
`_CHUNK`, a connection that has moved bulk once would keep 150 KB as long as it lives."""
_PIECE = _RECORD + 1024
"""A whole record, with its header and its tag."""
_NOTHING = memoryview(b"")


class End(Protocol):
    """One side of a connection. OSError (of which ssl.SSLError is one) is raised when it is broken."""

    def read(self) -> bytes | None:
        """What has come; empty at the end of the stream, None when nothing is there yet."""

    def write(self, data: bytes) -> None:
        """Take bytes, to be sent by `flush`."""

    def flush(self) -> bool:
        """Send what was taken; whether all of it is sent."""

    def close(self) -> None:
        """Say that nothing more will be written; `flush` sends that too."""


class PlainEnd:
    """A socket as it is."""

    def __init__(self, sock: Socket) -> None:
        self._socket = sock
        self._unsent = b""
        self._closing = False

    def read(self) -> bytes | None:
        """See `End`."""
        try:
            return self._socket.recv(_CHUNK)
        except BlockingIOError:
            return None

    def write(self, data: bytes) -> None:
        """See `End`."""
        self._unsent += data

    def flush(self) -> bool:
        """See `End`."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            return False
        if self._closing:
            self._closing = False
            end_stream(self._socket)
        return True

    def close(self) -> None:
        """See `End`."""
        self._closing = True


class TlsEnd:
    """A socket with TLS on it. A stream that ends without a close_notify was cut off, and is an error."""

    def __init__(self, sock: Socket, tls: Tls, server_name: str | None = None) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = tls
        self._connection = tls.context.wrap_bio(
            self._incoming, self._outgoing, server_side=tls.is_server, server_hostname=server_name
        )
        self._plain = PlainEnd(sock)
        self._arrived = _NOTHING
        """Read from the socket and not given to OpenSSL yet."""
        self._early: list[bytes] = []
        """Read from OpenSSL before it had to say goodbye."""
        self.is_broken = False
        """Whether the peer's stream was cut off, or is no TLS."""

    def handshake(self) -> bool:
        """Go on with it; whether it is complete. Raises ssl.SSLError with the reason when it has failed."""
        while True:
            try:
                self._connection.do_handshake()
                check_depth(self._connection, self._tls.verify_depth)
            except ssl.SSLWantReadError:
                self.flush()
                if not self._receive():
                    return False
            except ChainTooLongError:
                raise  # what is not sent holds a ticket, with which no chain would be looked at next time
            except ssl.SSLError:
                self.flush()  # the alert that tells the peer why
                raise
            else:
                return self.flush()

    def read(self) -> bytes | None:
        """See `End`."""
        if self._early:
            return self._early.pop(0)
        while True:
            if self._arrived:  # before OpenSSL asks for it: its exceptions cost more than a record
                self._feed()
            try:
                return self._connection.read(_RECORD)
            except ssl.SSLWantReadError:
                if not self._receive():
                    return None
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError:
                self.is_broken = True
                raise

    def write(self, data: bytes) -> None:
        """See `End`."""
        if len(data) <= _RECORD:
            self._connection.write(data)
            return
        plain, encrypted = memoryview(data), []
        for start in range(0, len(data), _RECORD):
            self._connection.write(plain[start : start + _RECORD])
            encrypted.append(self._outgoing.read())
        self._plain.write(b"".join(encrypted))

    def flush(self) -> bool:
        """See `End`."""
        if self._outgoing.pending:
            self._plain.write(self._outgoing.read())
        return self._plain.flush()

    def close(self) -> None:
        """See `End`."""
        # Saying goodbye makes OpenSSL read as well, and it takes data for an error then: have them out before.
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while data := self._connection.read(_RECORD):
                self._early.append(data)
        with contextlib.suppress(ssl.SSLWantReadError):  # the peer's own goodbye comes later
            self._connection.unwrap()
        if self._outgoing.pending:
            self._plain.write(self._outgoing.read())
        self._plain.close()

    def _receive(self) -> bool:
        """Whether OpenSSL has something new to look at."""
        if self._arrived:
            self._feed()
            return True
        data = self._plain.read()
        if data is None:
            return False
        if not data:
            self._incoming.write_eof()
        elif len(data) <= _PIECE:  # nearly always
            self._incoming.write(data)
        else:
            self._arrived = memoryview(data)
            self._feed()
        return True

    def _feed(self) -> None:
        """Give OpenSSL what it takes for a record, and no more."""
        room = _PIECE - self._incoming.pending
        self._incoming.write(self._arrived[:room])
        # Even an empty view would keep all of what it is a part of.
        self._arrived = self._arrived[room:] if room < len(self._arrived) else _NOTHING
