"""Serves the figures over HTTP to whoever scrapes them: GET /metrics, one request a connection.

`GET /metrics?clients` has the clients with most connections and bytes as well. They are not for Prometheus, which would
keep a series for each client for ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from select import EPOLLIN, EPOLLOUT
from typing import Any

from agent.relay.acceptor import Acceptor
from agent.relay.complaints import Complaints
from agent.relay.deadlines import Deadlines
from agent.relay.loop import Loop
from agent.relay.metrics import CONTENT_TYPE

MAX_CLIENTS = 16
MAX_REQUEST = 8192
TIMEOUT_SECONDS = 5.0
CLIENTS = b"?clients"


class _Client:
    """One request and its answer."""

    __slots__ = ("answer", "request", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.request = b""
        self.answer = b""


class MetricsServer:
    """The metrics listener of one worker; every worker can tell the figures of all."""

    def __init__(self, loop: Loop, complaints: Complaints, render: Callable[[bool], str]) -> None:
        self._loop = loop
        self._render = render
        self._clients: set[_Client] = set()
        self._deadlines = Deadlines[_Client](loop, TIMEOUT_SECONDS, self._close)
        self._acceptor = Acceptor(loop, complaints, self._on_accepted, lambda _name: len(self._clients) >= MAX_CLIENTS)
        self._idle: Callable[[], None] | None = None

    @property
    def busy(self) -> int:
        """How many clients are waited for: those that came before `drain`."""
        return len(self._clients) if self._idle is not None else 0

    def listen(self, sock: socket.socket) -> None:
        """Serve a listening socket."""
        self._acceptor.listen(sock, "metrics")

    def leave(self, sock: socket.socket) -> None:
        """Serve a socket no more. It is closed here."""
        self._acceptor.leave(sock)

    def drain(self, idle: Callable[[], None]) -> None:
        """Accept nobody any more; `idle` is called when the last one has been answered."""
        self._acceptor.stop()
        self._idle = idle

    def stop(self) -> None:
        """Serve nobody any more."""
        self._acceptor.stop()

    def _on_accepted(self, sock: socket.socket, _peer: Any, _name: str) -> None:
        sock.setblocking(False)
        client = _Client(sock)
        self._clients.add(client)
        self._deadlines.add(client)
        self._loop.watch(sock.fileno(), EPOLLIN, partial(self._on_event, client))

    def _on_event(self, client: _Client, _mask: int) -> None:
        try:
            if client.answer:
                client.answer = client.answer[client.socket.send(client.answer) :]
            elif not self._hear(client):
                return
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        if not client.answer:
            self._close(client)

    def _hear(self, client: _Client) -> bool:
        """Whether the request is complete, so that the answer can be sent, or is given up."""
        data = client.socket.recv(MAX_REQUEST)
        client.request += data
        complete = b"\r\n\r\n" in client.request or b"\n\n" in client.request
        if not complete and data and len(client.request) < MAX_REQUEST:
            return False
        if complete:
            client.answer = answer(client.request, self._render)
            self._loop.change(client.socket.fileno(), EPOLLOUT)
        return True

    def _close(self, client: _Client) -> None:
        self._deadlines.discard(client)
        self._clients.discard(client)
        self._loop.close(client.socket)
        if self._idle is not None and not self._clients:
            self._idle()


def answer(request: bytes, render: Callable[[bool], str]) -> bytes:
    """The HTTP response to a request; `render` is told whether the clients are wanted too."""
    words = request.split(b"\n", 1)[0].split()
    body, status, kind = "", "404 Not Found", "text/plain"
    if words[:1] not in ([b"GET"], [b"HEAD"]):
        status = "405 Method Not Allowed"
    elif len(words) > 1 and words[1].split(b"?")[0] in (b"/metrics", b"/"):
        body, status, kind = render(words[1].endswith(CLIENTS)), "200 OK", CONTENT_TYPE
    content = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (content if words[:1] == [b"GET"] else b"")
