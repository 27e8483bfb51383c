"""Opens listening sockets, or takes over those that somebody else has opened, and deals them out to the workers."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tpctl.host import port_users
from tpctl.host.sockets import at_ports
from tpctl.relay.connections.socket_options import is_transparent, keep_alive, make_transparent
from tpctl.relay.loop import packet_info
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import Listen, show
from tpctl.relay.settings.model import ListenerSettings, Role, Settings, Source
from tpctl.spec.policy import Protocol
from tpctl.system.errors import HostError

_RECEIVE_BUFFER = 1024 * 1024
_MOST_USERS = 3
_DEFER_SECONDS = 1
"""As nginx; the kernel rounds it up to the next retransmission of the SYN-ACK."""


class Place(NamedTuple):
    """Where sockets listen."""

    address: str
    kind: socket.SocketKind


Sockets = dict[Place, list[socket.socket]]
"""Of every listener: one, or, with reuseport, one a worker."""


def places(listener: ListenerSettings) -> tuple[Place, ...]:
    """What a listener needs: TCP, and UDP too for DNS."""
    stream = Place(show(listener.listen.address), socket.SOCK_STREAM)
    return (stream, Place(stream.address, socket.SOCK_DGRAM)) if listener.role is Role.DNS else (stream,)


def open_sockets(
    settings: Settings,
    held: Mapping[Place, Sequence[socket.socket]] | None = None,
    left_soon: frozenset[int] = frozenset(),
) -> tuple[Sockets, list[socket.socket]]:
    """Every socket the settings need, and which of them are new; those that are `held` already are used.

    `left_soon` are ports of TCP on which another process of this user listens yet, with SO_REUSEPORT: sockets for them
    are bound, and do not listen before `begin_listening`. Raises HostError, naming the address, when one cannot be had;
    nothing new is open then.

    Several workers share a port by SO_REUSEPORT, which would also let two relays of one user share it without a word.
    So the port is first taken without it, as a single worker does.
    """
    found: Sockets = {}
    new: list[socket.socket] = []
    for listener in settings.listeners:
        if listener.source is Source.CLIENT:
            _require_foreign_addresses(listener)
    try:
        for listener, place in wanted(settings):
            if held and held.get(place):
                found[place] = list(held[place])
                for sock in found[place]:
                    try:
                        _adapt(sock, listener.listen, place)
                    except OSError as error:
                        raise HostError(_reason(listener, place, error)) from error
                continue
            if listener.listen.port in left_soon and place.kind is socket.SOCK_STREAM:
                found[place] = [_bind(listener, place, shared=True, listening=False)]
                new += found[place]
                continue
            shared = listener.listen.reuseport and settings.workers > 1
            alone = _bind(listener, place, shared=False)
            if shared:
                alone.close()
                found[place] = [_bind(listener, place, shared=True) for _ in range(settings.workers)]
            else:
                found[place] = [alone]
            new += found[place]
    except HostError:
        for sock in new:
            sock.close()
        raise
    return found, new


def wanted(settings: Settings) -> Iterator[tuple[ListenerSettings, Place]]:
    """Every place of every listener, the metrics among them."""
    for listener in settings.served:
        for place in places(listener):
            yield listener, place


def deal(sockets: Sequence[socket.socket], worker: int, workers: int) -> list[socket.socket]:
    """Those of a place that are a worker's: every socket has a worker, and every worker a socket."""
    if len(sockets) < workers:
        return [sockets[worker % len(sockets)]]
    return list(sockets[worker::workers])


def begin_listening(settings: Settings, added: Sockets) -> None:
    """Listen on those of the new sockets whose ports another process has left, and share these with nobody more."""
    for listener, place in wanted(settings):
        for sock in added.get(place, ()):
            if place.kind is socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.listen(listener.listen.backlog)
                share_port(sock, shared=False)


def share_port(sock: socket.socket, *, shared: bool) -> None:
    """Whether another socket of this user may be bound to the same port; that one has to agree too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)


def _bind(listener: ListenerSettings, place: Place, *, shared: bool, listening: bool = True) -> socket.socket:
    listen, address = listener.listen, listener.listen.address
    sock: socket.socket | None = None
    try:
        sock, name = _socket(listen, place.kind)
        if shared:
            share_port(sock, shared=True)
        if listen.transparent:
            make_transparent(sock)
        if place.kind is socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        elif isinstance(address, Destination):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if isinstance(address, PurePosixPath):
            _clear_stale(Path(address))
        sock.bind(name)
        _adapt(sock, listen, place, listening=listening)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise HostError(_reason(listener, place, error)) from error
    return sock


def _require_foreign_addresses(listener: ListenerSettings) -> None:
    """Raise HostError unless this process may dial from an address of somebody else, as it will have to."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            make_transparent(probe)
        except PermissionError:
            raise HostError(
                f"source: client of the {listener.name} listener needs the capability CAP_NET_RAW or CAP_NET_ADMIN; "
                "started as root with --user, the relay keeps it, but does not gain it later"
            ) from None


def _reason(listener: ListenerSettings, place: Place, error: OSError) -> str:
    address = listener.listen.address
    users: tuple[str, ...] = ()
    if isinstance(address, Destination):
        transport = Protocol.TCP if place.kind is socket.SOCK_STREAM else Protocol.UDP
        what = f"{transport.upper()} port {address.port} of {address.host} for the {listener.name} listener"
        other = f"choose another port, as with --{listener.role}-port"
        if error.errno == errno.EADDRINUSE:
            users = port_users.in_words(at_ports(transport, (address.port,)))[:_MOST_USERS]
    else:
        what = f"{place.address} for the {listener.name} listener"
        other = "choose another path"
    if error.errno == errno.EADDRINUSE:
        return f"{what} is in use{_in_brackets(users)}; stop what has it, or {other}"
    if error.errno == errno.EPERM and listener.listen.transparent:
        return f"{what} cannot be opened: transparent needs the capability CAP_NET_RAW or CAP_NET_ADMIN"
    return f"{what} cannot be opened: {error.strerror}"


def _in_brackets(users: tuple[str, ...]) -> str:
    return f" ({'; '.join(users)})" if users else ""


def _socket(listen: Listen, kind: socket.SocketKind) -> tuple[socket.socket, tuple[str, int] | str]:
    """A socket of the address's family, and what to bind it to.

    IPv4 for the wildcard of both families on a kernel without IPv6, or where it is disabled in this namespace.
    """
    address = listen.address
    if isinstance(address, PurePosixPath):
        return socket.socket(socket.AF_UNIX, kind), str(address)
    if address.family == socket.AF_INET6:
        try:
            sock = socket.socket(socket.AF_INET6, kind)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listen.ipv6only)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or not listen.is_wildcard or listen.ipv6only:
                raise HostError(f"{address}: {error.strerror}") from error
        else:
            return sock, (address.host, address.port)
    host = "0.0.0.0" if listen.is_wildcard else address.host
    return socket.socket(socket.AF_INET, kind), (host, address.port)


def _adapt(sock: socket.socket, listen: Listen, place: Place, *, listening: bool = True) -> None:
    """Options that may change while a socket listens."""
    sock.setblocking(False)
    if place.kind is socket.SOCK_DGRAM:
        packet_info.enable(sock)
        return
    if sock.family != socket.AF_UNIX:
        if listen.transparent and not is_transparent(sock):  # somebody else has opened it
            make_transparent(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit all of these
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_SECONDS if listen.deferred else 0)
        if listen.keepalive is not None:
            keep_alive(sock, listen.keepalive)
    if listening:
        sock.listen(listen.backlog)


def _clear_stale(path: Path) -> None:
    """Remove the socket file of a process that has ended: nobody answers there any more."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            return
