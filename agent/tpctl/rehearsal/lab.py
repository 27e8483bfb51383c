"""The scratch laboratory: a topology, listeners on it, and dialling with a report of who answered."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tpctl.change import device_routes
from tpctl.rehearsal import sockets
from tpctl.rehearsal.cgroup import OwnGroups
from tpctl.rehearsal.layout import HOST, LOOPBACK, Layout, seat
from tpctl.rehearsal.namespaces import Namespace
from tpctl.rehearsal.sockets import Answer, Listener, Seat
from tpctl.rehearsal.topology import build
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.policy import Address, Family, Policy, Protocol, means_this_host

NEGATIVE_SECONDS = 0.2
"""How long silence is waited for; within one machine an answer takes less than a millisecond."""
PATIENCE_SECONDS = 10.0
"""How long an answer is waited for that should come: on a busy machine nobody may get to it for long."""
_LAST_LOOKS = 100
"""How often it is looked, at most, for what had come before the time was up."""
_FIRST_SOURCE_PORT = 20000
_LAST_SOURCE_PORT = 60000
_SOURCE_PORT_TRIES = 5
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger (socket(7)). A connection leaves no TIME_WAIT behind, which would take its source port for a minute."""
_OUTCOMES = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset"}


class Lab:
    """Namespaces laid out for one policy. Use as a context manager; everything is gone at the end.

    Raises HostError when the kernel does not allow it.
    """

    def __init__(self, layout: Layout, groups: OwnGroups | None = None, host: Namespace | None = None) -> None:
        """`groups` are needed to dial from control groups. `host` is used instead of a scratch namespace."""
        self.layout = layout
        self.groups = groups
        self.spaces: dict[str, Namespace] = build(layout, host)
        with self.inside(HOST):  # an install finds the interfaces there; these may have come after it
            device_routes.add(LOOPBACK, layout.families)
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[tuple[str, Protocol, Family, int], Listener] = {}
        # Every dial has a source port of its own: NAT of UDP would remember the last one's fate.
        self._source_ports = itertools.cycle(range(_FIRST_SOURCE_PORT, _LAST_SOURCE_PORT))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every socket and let the namespaces go."""
        for listener in self._listeners.values():
            listener.socket.close()
        self._selector.close()
        for space in self.spaces.values():
            space.close()

    @contextlib.contextmanager
    def inside(self, node: str, uid: int = 0) -> Iterator[None]:
        """Run the block inside a node's namespace, as `uid`; programs started there inherit the namespace."""
        with self.spaces[node].inside(uid):
            yield

    def listen(
        self, node: str, protocol: Protocol, port: int, uid: int = 0, *, transparent: bool | None = None
    ) -> None:
        """Open named listeners of every family on a port, created by `uid`, unless there are some already.

        `transparent` ones take what TPROXY hands over; left out, all are but the host's.
        """
        for family in self.layout.families:
            key = (node, protocol, family, port)
            if key in self._listeners:
                continue
            with self.inside(node, uid):
                made = sockets.new_socket(protocol, family)
                sockets.listen(made, protocol, family, port)
            if transparent or (transparent is None and node != HOST):
                sockets.make_transparent(made, family)
            listener = Listener(Seat(node, port), protocol, family, made)
            self._listeners[key] = listener
            self._selector.register(made, selectors.EVENT_READ, listener)

    def listener(self, connection: Connection) -> Listener:
        """The open listener where a connection ends when it is not redirected. See `serve`."""
        node, port = seat(self.layout, connection)
        return self._listeners[(node, Protocol(connection.protocol), connection.family, port)]

    def forget(self, node: str) -> None:
        """Close the listeners of a node: another policy's data plane listens elsewhere, under another user."""
        for key in [key for key in self._listeners if key[0] == node]:
            listener = self._listeners.pop(key)
            self._selector.unregister(listener.socket)
            listener.socket.close()

    def serve_data_plane(self, policy: Policy) -> None:
        """Open the listeners that a data plane under the policy's user would have."""
        self.listen(
            HOST, Protocol.TCP, policy.inbound.port, policy.proxy_uid, transparent=policy.inbound.is_transparent
        )
        self.listen(HOST, Protocol.TCP, policy.outbound.port, policy.proxy_uid)
        for protocol in Protocol:
            self.listen(HOST, protocol, policy.dns.port, policy.proxy_uid)

    def serve(self, connection: Connection) -> None:
        """Open listeners where the connection may end when it is not redirected."""
        protocol = Protocol(connection.protocol)
        node, port = seat(self.layout, connection)
        self.listen(node, protocol, port)

    def dial(self, connection: Connection, *, timeout: float = PATIENCE_SECONDS, relayed: bool = False) -> Answer:
        """Open the connection for real and say who answered. `timeout` is in seconds.

        With `relayed` a real data plane may stand in between, and the answer of whoever it calls counts.
        """
        protocol = Protocol(connection.protocol)
        try:
            dialler = self.begin(connection)
        except OSError as error:
            return Answer(_outcome(error))
        with dialler:
            return _Dial(self._selector, dialler, protocol, relayed).run(timeout)

    def begin(self, connection: Connection) -> socket.socket:
        """A socket that has begun to connect. Raises OSError when the kernel refuses at once."""
        tries = 1 if connection.source_port else _SOURCE_PORT_TRIES
        for left in reversed(range(tries)):
            try:
                return self._dialler(connection, connection.source_port or next(self._source_ports))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not left:
                    raise
        raise AssertionError("unreachable")

    def _dialler(self, connection: Connection, source_port: int) -> socket.socket:
        protocol = Protocol(connection.protocol)
        node = self.layout.origin(connection)
        with self._in_group(connection.cgroup), self.inside(node, connection.uid or 0):
            made = sockets.new_socket(protocol, connection.family)
        if connection.direction is Direction.INBOUND or not connection.local_source:
            sockets.make_transparent(made, connection.family)
        device = connection.device
        if connection.direction is Direction.INBOUND and means_this_host(connection.destination):
            device = self.layout.link_of_origin(connection)  # or it would not leave the node that opens it
        if connection.mark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", connection.mark))
        if device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        with self._in_group(connection.cgroup), self.inside(node, connection.uid or 0):
            try:
                if protocol is Protocol.TCP:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                scope = 0
                if connection.family is Family.IPV6 and connection.destination.is_link_local:
                    scope = socket.if_nametoindex(self.layout.link_of_origin(connection))
                made.bind(_sockname(connection.source, source_port, scope))
                assert connection.destination_port is not None
                with contextlib.suppress(BlockingIOError):
                    made.connect(_sockname(connection.destination, connection.destination_port, scope))
                _raise_what_came_meanwhile(made)
            except BaseException:
                made.close()
                raise
        return made

    def _in_group(self, path: str | None) -> contextlib.AbstractContextManager[None]:
        return self.groups.inside(path) if self.groups else contextlib.nullcontext()


def _sockname(address: Address, port: int, scope: int) -> tuple[str, int] | tuple[str, int, int, int]:
    return (str(address), port) if address.version == 4 else (str(address), port, 0, scope)


def _raise_what_came_meanwhile(made: socket.socket) -> None:
    """Raises OSError for what has refused a connection already.

    Over veth, an ICMP error can come while connect() still holds the socket; then it is only noted (tcp_v4_err() and
    tcp_v6_err() in the kernel), and without a look the socket would wait a second, until the SYN is sent again.
    """
    if number := made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(number, os.strerror(number))


def _outcome(error: OSError) -> str:
    return _OUTCOMES.get(error.errno or 0, f"unreachable ({error.strerror})")


class _Dial:
    """One dial: turns the selector until the dialler has an answer or the time is up."""

    def __init__(
        self, selector: selectors.BaseSelector, dialler: socket.socket, protocol: Protocol, relayed: bool
    ) -> None:
        self.selector = selector
        self.dialler = dialler
        self.protocol = protocol
        self.relayed = relayed
        self.port = int(dialler.getsockname()[1])
        self.accepted: list[socket.socket] = []
        self.seen: Answer | None = None
        self.result: Answer | None = None

    def run(self, timeout: float) -> Answer:
        """The answer, or a timeout."""
        events = selectors.EVENT_WRITE
        if self.protocol is Protocol.UDP:
            try:
                self.dialler.send(sockets.QUERY)
            except PermissionError:
                pass  # a rule took it on its way out; whether it is answered for tells a refusal from a loss
            except OSError as error:
                return Answer(_outcome(error))
            events = selectors.EVENT_READ
        self.selector.register(self.dialler, events, None)
        try:
            self._turn(time.monotonic() + timeout)
        finally:
            self.selector.unregister(self.dialler)
            for connection in self.accepted:
                connection.close()
        return self.result or Answer("timeout")

    def _turn(self, deadline: float) -> None:
        """Handle what comes until then, and what had come by then: this process itself may have had to wait."""
        last_looks = 0
        while self.result is None and last_looks < _LAST_LOOKS:
            left = deadline - time.monotonic()
            ready = self.selector.select(max(left, 0))
            for key, _ in ready:
                self._ready(key.data)
            if left <= 0:
                if not ready:
                    return
                last_looks += 1

    def _ready(self, listener: Listener | None) -> None:
        if listener is None:
            self._dialler_ready()
        elif listener.protocol is Protocol.UDP:
            asker = sockets.answer_datagram(listener)
            if asker:
                self._saw(asker[1], Answer("answered", listener.seat, source=asker[0]))
        else:
            self._accept(listener)

    def _saw(self, port: int, answer: Answer) -> None:
        """A listener was reached from a port: it is this dial, or a proxy's, or the rest of an earlier one."""
        if port == self.port:
            self.seen = answer
        elif self.relayed:
            self.seen = dataclasses.replace(answer, direct=False)

    def _accept(self, listener: Listener) -> None:
        try:
            connection, peer = listener.socket.accept()
        except OSError:
            return
        self.accepted.append(connection)
        original = sockets.original_destination(connection, listener.family)
        name = connection.getsockname()
        own = (sockets.address_of(name), int(name[1]))
        answer = Answer("answered", listener.seat, original, own, sockets.address_of(peer))
        self._saw(int(peer[1]), answer)
        with contextlib.suppress(OSError):
            connection.send(str(listener.seat).encode())

    def _dialler_ready(self) -> None:
        try:
            received = self.dialler.recv(256)
        except BlockingIOError:
            # A TCP connection that was just established: now wait for the name.
            self.selector.modify(self.dialler, selectors.EVENT_READ, None)
            return
        except OSError as error:
            self.result = Answer(_outcome(error))
            return
        said = sockets.named_in(received) if self.protocol is Protocol.UDP else received.decode()
        if self.seen and str(self.seen.seat) == said:
            self.result = self.seen
        else:
            self.result = Answer("closed" if not said else f"unexpected answer {said!r}")
