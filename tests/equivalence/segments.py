"""TCP segments that are no first packet of a connection: what an engine must leave alone, and what it may drop."""

from __future__ import annotations

import select
import socket
import struct
import time

from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.sockets import AF
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Family

_FIN_ACK = 0x11
_RST = 0x04
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_IPV6_CHECKSUM = 7
_CHECKSUM_OFFSET = 16


class Running:
    """A connection that was opened, and is accepted, where it ends when nobody redirects it."""

    def __init__(self, lab: Lab, connection: Connection, seconds: float) -> None:
        """Raises OSError when it does not come there within so many seconds."""
        self.connection = connection
        lab.serve(connection)
        listener = lab.listener(connection).socket
        self.near = lab.begin(connection)
        try:
            self.far = _accepted(listener, self.near, seconds)
        except BaseException:
            self.near.close()
            raise
        # A segment that a rule has caught would be sent again only after a while.
        self.near.setblocking(False)
        self.far.setblocking(False)

    def goes_on(self, seconds: float) -> bool:
        """Whether data still arrives, both ways."""
        return _passes(self.near, self.far, seconds) and _passes(self.far, self.near, seconds)

    def close(self) -> None:
        """End it, without a TIME_WAIT."""
        self.far.close()
        self.near.close()


def _accepted(listener: socket.socket, near: socket.socket, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([listener, near], [], [], left)
        if listener not in ready:  # the time is up, or it was refused
            break
        accepted, peer = listener.accept()
        if peer[1] == near.getsockname()[1]:
            return accepted
        accepted.close()
    raise OSError("nobody came")


def _passes(sender: socket.socket, receiver: socket.socket, seconds: float) -> bool:
    try:
        sender.send(b"x")
        return bool(select.select([receiver], [], [], seconds)[0]) and receiver.recv(16) == b"x"
    except OSError:
        return False


def is_answered(lab: Lab, connection: Connection, port: int, seconds: float) -> bool:
    """Whether the end of a connection that never was gets a reset, that is, whether it arrives.

    conntrack calls a FIN-ACK of no connection invalid (tcp_conntracks in nf_conntrack_proto_tcp.c).
    """
    assert connection.destination_port is not None
    family = connection.family
    with lab.inside(lab.layout.origin(connection)):
        raw = socket.socket(AF[family], socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP)
    with raw:
        if family is Family.IPV4:
            raw.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        else:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _CHECKSUM_OFFSET)
        raw.bind((str(connection.source), 0))
        header = struct.pack("!HHIIBBHHH", port, connection.destination_port, 1, 1, 5 << 4, _FIN_ACK, 1024, 0, 0)
        if family is Family.IPV4:
            header = header[:16] + _checksum(connection, header) + header[18:]
        raw.sendto(header, (str(connection.destination), 0))
        return _reset_comes(raw, connection, port, seconds)


def _reset_comes(raw: socket.socket, connection: Connection, port: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    wanted = struct.pack("!HH", connection.destination_port, port)
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([raw], [], [], left)[0]:
            break
        segment = raw.recv(256)
        if connection.family is Family.IPV4:
            segment = segment[(segment[0] & 0xF) * 4 :]
        if segment[:4] == wanted and segment[13] & _RST:
            return True
    return False


def _checksum(connection: Connection, header: bytes) -> bytes:
    """RFC 9293, 3.1: over the addresses, the protocol, the length and the segment."""
    data = connection.source.packed + connection.destination.packed
    data += struct.pack("!HH", socket.IPPROTO_TCP, len(header)) + header
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
