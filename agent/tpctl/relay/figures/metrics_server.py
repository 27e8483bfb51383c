"""Serves the figures over HTTP to whoever scrapes them: GET /metrics, one request a connection.

`GET /healthz` answers 200 as long as the relay is alive, and `GET /ready` as long as it accepts connections; else 503
with the reason, as probes of orchestrators and load balancers expect.

`GET /metrics?clients` has the clients with most connections and bytes as well. They are not for Prometheus, which would
keep a series for each client for ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial
from select import EPOLLIN, EPOLLOUT
from typing import Any

from tpctl.relay.connections.acceptor import LIMIT_REACHED, Acceptor
from tpctl.relay.figures.metrics import CONTENT_TYPE
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.loop import Loop

MAX_CLIENTS = 16
MAX_REQUEST = 8192
TIMEOUT_SECONDS = 5.0
CLIENTS = b"?clients"
Probes = Mapping[bytes, Callable[[], str | None]]
"""By path, what says why the answer is no; None for yes."""


class _Client:
    """One request and its answer."""

    __slots__ = ("answer", "request", "socket")

    def __init__(self, sock: Socket) -> None:
        self.socket = sock
        self.request = b""
        self.answer = b""


class MetricsServer:
    """The metrics listener of one worker; every worker can tell the figures of all."""

    def __init__(self, loop: Loop, complaints: Complaints, render: Callable[[bool], str], probes: Probes) -> None:
        self._loop = loop
        self._render = render
        self._probes = probes
        self._clients: set[_Client] = set()
        self._deadlines = Deadlines[_Client](loop, TIMEOUT_SECONDS, self._close)
        self._acceptor = Acceptor(loop, complaints, self._on_accepted, self._is_full)
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

    def break_off(self, _error: Exception, client: _Client, *_arguments: object) -> None:
        """Close a connection because of an error that nobody expected (`Loop.contain`)."""
        self._close(client)

    def _is_full(self, _name: str) -> str | None:
        return LIMIT_REACHED if len(self._clients) >= MAX_CLIENTS else None

    def _on_accepted(self, sock: Socket, _peer: Any, _name: str) -> None:
        sock.setblocking(False)
        client = _Client(sock)
        self._loop.watch(sock.fileno(), EPOLLIN, partial(self._on_event, client))
        self._clients.add(client)
        self._deadlines.add(client)

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
            client.answer = answer(client.request, self._render, self._probes)
            self._loop.change(client.socket.fileno(), EPOLLOUT)
        return True

    def _close(self, client: _Client) -> None:
        self._deadlines.discard(client)
        self._clients.discard(client)
        self._loop.close(client.socket)
        if self._idle is not None and not self._clients:
            self._idle()


def answer(request: bytes, render: Callable[[bool], str], probes: Probes) -> bytes:
    """The HTTP response to a request; `render` is told whether the clients are wanted too."""
    words = request.split(b"\n", 1)[0].split()
    body, status, kind = "", "404 Not Found", "text/plain"
    if words[:1] not in ([b"GET"], [b"HEAD"]):
        status = "405 Method Not Allowed"
    elif len(words) > 1 and words[1].split(b"?")[0] in (b"/metrics", b"/"):
        body, status, kind = render(words[1].endswith(CLIENTS)), "200 OK", CONTENT_TYPE
    elif len(words) > 1 and (probe := probes.get(words[1].split(b"?")[0])) is not None:
        trouble = probe()
        body, status = (f"{trouble}\n", "503 Service Unavailable") if trouble else ("ok\n", "200 OK")
    content = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (content if words[:1] == [b"GET"] else b"")
