"""Opens the sockets on which the relay is reached."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from agent.errors import HostError
from agent.relay import packet_info
from agent.relay.settings import Settings

BACKLOG = 4096
"""The kernel cuts it to net.core.somaxconn."""
_RECEIVE_BUFFER = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Listeners:
    """The sockets of one worker."""

    inbound: socket.socket
    outbound: socket.socket
    dns_tcp: socket.socket
    dns_udp: socket.socket

    @property
    def all(self) -> tuple[socket.socket, ...]:
        """Every one of them."""
        return (self.inbound, self.outbound, self.dns_tcp, self.dns_udp)

    def close(self) -> None:
        """Close them all."""
        for listener in self.all:
            listener.close()


def open_listeners(settings: Settings) -> list[Listeners]:
    """One set of listeners a worker. Raises HostError, naming the port, when one cannot be had.

    Several workers share the ports by SO_REUSEPORT, which would also let two relays of one user share them without a
    word. So the ports are first taken without it, as a single worker does.
    """
    alone = _open(settings, shared=False)
    if settings.workers == 1:
        return [alone]
    alone.close()
    opened: list[Listeners] = []
    try:
        for _ in range(settings.workers):
            opened.append(_open(settings, shared=True))
    except HostError:
        for listeners in opened:
            listeners.close()
        raise
    return opened


def _open(settings: Settings, *, shared: bool) -> Listeners:
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    with ExitStack() as undo:
        sockets = []
        for name, kind in (("inbound", stream), ("outbound", stream), ("dns", stream), ("dns", datagram)):
            listener = _bind(settings.bind_address, settings.named_ports[name], kind, shared=shared, name=name)
            undo.callback(listener.close)
            sockets.append(listener)
        undo.pop_all()
    return Listeners(*sockets)


def _bind(address: str, port: int, kind: socket.SocketKind, *, shared: bool, name: str) -> socket.socket:
    listener = _socket(address, kind)
    if listener.family == socket.AF_INET and address == "::":
        address = "0.0.0.0"
    transport = "TCP" if kind is socket.SOCK_STREAM else "UDP"
    try:
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind is socket.SOCK_STREAM:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            packet_info.enable(listener)
        listener.bind((address, port))
        if kind is socket.SOCK_STREAM:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        what = f"{transport} port {port} of {address} for the {name} listener"
        if error.errno == errno.EADDRINUSE:
            raise HostError(f"{what} is in use; stop what listens there, or choose --{name}-port") from error
        raise HostError(f"{what} cannot be opened: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _socket(address: str, kind: socket.SocketKind) -> socket.socket:
    """A socket of the address's family; IPv4 for the IPv6 wildcard on a kernel without IPv6."""
    if ":" in address:
        try:
            return socket.socket(socket.AF_INET6, kind)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or address != "::":
                raise HostError(f"--bind-address {address}: {error.strerror}") from error
    return socket.socket(socket.AF_INET, kind)
