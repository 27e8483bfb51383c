"""How a supervisor tells its workers of another state: the state in a memory file, the new sockets as descriptors.

A worker says when it has taken one, or that it cannot: until then it does as before.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import pickle
import socket

from tpctl.relay.process.running import Running
from tpctl.relay.process.sockets import Sockets, wanted
from tpctl.system.errors import HostError

_MAX_SOCKETS = 253
"""SCM_MAX_FD (net/scm.h)."""


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the worker's. A worker sees the end of a supervisor as the end of the channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, running: Running, added: Sockets) -> None:
    """Tell a worker of a state; `added` are its sockets that the worker does not have yet.

    Raises OSError when the worker has gone, or has not read anything for so long that there is no room.
    """
    order = [(place, len(sockets)) for place, sockets in added.items()]
    memory = os.memfd_create("tpctl-relay", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            pickle.dump((running.settings, running.slots, order), file)
        descriptors = [sock.fileno() for sockets in added.values() for sock in sockets]
        rights = array.array("i", [memory, *descriptors])
        channel.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)
    finally:
        os.close(memory)


def answer(channel: socket.socket) -> None:
    """Tell the supervisor that a state has been taken, or cannot be. One that has gone does not hear it."""
    with contextlib.suppress(OSError):
        channel.send(b"!", socket.MSG_DONTWAIT)


def is_answer(channel: socket.socket) -> bool:
    """Take the answer of a worker; False when it has gone instead. Raises BlockingIOError when there is neither."""
    try:
        return bool(channel.recv(1, socket.MSG_DONTWAIT))
    except ConnectionError:
        return False


def receive(channel: socket.socket, known: Sockets) -> Running | None:
    """The state that was sent, of which the worker has some sockets already; None when the supervisor has gone.

    Raises OSError when there is no room for all of the descriptors, HostError when there was none before.
    """
    message, descriptors, flags, _address = socket.recv_fds(channel, 1, _MAX_SOCKETS)
    if not message:
        return None
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with os.fdopen(descriptors[0], "rb") as file:
        file.seek(0)
        settings, slots, order = pickle.load(file)  # noqa: S301 - from the process that has forked this one
    left = iter(descriptors[1:])
    sockets = {place: known[place] for _listener, place in wanted(settings) if place in known}
    for place, number in order:
        sockets[place] = [socket.socket(fileno=next(left)) for _ in range(number)]
    if missing := [place.address for _listener, place in wanted(settings) if place not in sockets]:
        raise HostError(f"sockets arrived when there was no room for them: {', '.join(missing)}")
    return Running(settings, sockets, slots)
