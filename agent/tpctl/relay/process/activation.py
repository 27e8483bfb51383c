"""Listening sockets that somebody else has opened: systemd's socket units and descriptor store, or a predecessor.

The protocol is that of sd_listen_fds(3): descriptors from 3 on, their number in LISTEN_FDS, their names in
LISTEN_FDNAMES, meant for the process in LISTEN_PID.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tpctl.relay.loop.original_destination import from_socket_name
from tpctl.relay.process.notify import store, unstore
from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import Place, Sockets, wanted
from tpctl.relay.settings.listen import show
from tpctl.relay.settings.model import ListenerSettings, Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

FIRST = 3
"""SD_LISTEN_FDS_START."""
VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")
MAX_NAME = 255
"""sd_pid_notify_with_fds(3), FDNAME=."""


class Inherited(NamedTuple):
    """A socket and what it was called."""

    name: str
    socket: socket.socket


def count(environ: Mapping[str, str], pid: int) -> int:
    """How many descriptors a process was given."""
    number = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(pid) or not number.isdecimal():
        return 0
    return int(number)


def inherited() -> list[Inherited]:
    """The sockets this process was given. They are not passed on to others, and asked for once only."""
    number, names = count(os.environ, os.getpid()), os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in VARIABLES:
        os.environ.pop(variable, None)
    found = []
    for at in range(number):
        os.set_inheritable(FIRST + at, False)
        name = names[at] if at < len(names) else ""
        try:
            found.append(Inherited(name, socket.socket(fileno=FIRST + at)))
        except OSError:  # no socket at all
            os.close(FIRST + at)
    return found


def match(settings: Settings, given: Iterable[Inherited], log: FilteringBoundLogger) -> Sockets:
    """The sockets by the place they serve: the one they are bound to, or else that of the listener of their name.

    With systemd, where a listener listens is said in the socket unit. What belongs to no listener is closed, and so is
    what came twice: by the socket unit, and by the store of descriptors.
    """
    listeners = {place: listener for listener, place in wanted(settings)}
    places = {place: listener.name for place, listener in listeners.items()}
    found: Sockets = {}
    known: set[int] = set()
    for one in given:
        inode = os.fstat(one.socket.fileno()).st_ino
        if inode in known:
            one.socket.close()
            continue
        known.add(inode)
        own = Place(_address(one.socket), one.socket.type)
        named = [place for place, name in places.items() if name == one.name and place.kind == own.kind]
        # Without IPv6, systemd listens on the wildcard of IPv4 in its place.
        other = Place(own.address.replace("0.0.0.0", "[::]"), own.kind)
        place = next((place for place in (own, *named, other) if place in places), None)
        if place is None:
            log.warning("a socket that was handed over belongs to no listener", name=one.name, address=own.address)
            one.socket.close()
            unstore(one.name)  # or it would go on taking what nobody answers
        else:
            found.setdefault(place, []).append(one.socket)
            _look_at(one.socket, listeners[place], log)
    return found


def _look_at(sock: socket.socket, listener: ListenerSettings, log: FilteringBoundLogger) -> None:
    """Whether an open socket serves what its listener should, which cannot be changed any more (ipv6(7))."""
    if sock.family == socket.AF_INET6 and listener.listen.is_wildcard:
        ipv6only = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
        if ipv6only != listener.listen.ipv6only:
            log.warning(
                "a socket that was handed over is not what its listener asks for; it stays as it was opened",
                listener=listener.name,
                ipv6only="on" if ipv6only else "off",
            )


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, tuple):
        return show(from_socket_name(name[:2] if sock.family == socket.AF_INET else name))
    return f"unix:{name}"


def keep(before: Settings, running: Running) -> None:
    """Have the service manager keep the sockets of a state for the next start, in place of those of these settings."""
    names = {place: _stored_name(listener.name, place) for listener, place in wanted(before)}
    for place in names.keys() - running.sockets.keys():
        unstore(names[place])
    for listener, place in wanted(running.settings):
        if place not in names:
            store(_stored_name(listener.name, place), *running.sockets[place])


def _stored_name(listener: str, place: Place) -> str:
    """Under which sockets are kept: places are told apart, since names of listeners may be exchanged by a reload."""
    return f"{listener}.{place.kind}.{place.address}".replace(":", "_")[-MAX_NAME:]


def names_of(settings: Settings, sockets: Sockets) -> list[Inherited]:
    """Every socket with the name of its listener, to be handed over."""
    return [
        Inherited(listener.name[:MAX_NAME], sock)
        for listener, place in wanted(settings)
        for sock in sockets.get(place, ())
    ]


def environment(given: Sequence[Inherited], pid: int) -> dict[str, str]:
    """The variables with which a process is told of its sockets."""
    names = ":".join(one.name for one in given)
    return {"LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": names, "LISTEN_PID": str(pid)}
