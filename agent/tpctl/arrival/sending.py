"""Sends probes, all at once, and watches where they end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from tpctl.arrival import aftermath
from tpctl.arrival.cable import TYPE_OF_SERVICE
from tpctl.arrival.model import PATIENCE_SECONDS, Fate, Kind, Outcome, Probe
from tpctl.arrival.outside import Outside
from tpctl.arrival.patience import LOOK_SECONDS, Waited
from tpctl.arrival.places import Audience, Place, new_socket
from tpctl.host import conntrack, sockets
from tpctl.host.conntrack import Flow
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.policy import Family, Protocol

CARRY_SECONDS = 0.3
"""How long the data plane may take to call the destination on, before that is said to be missing."""
_HELLO = b"tpctl check\n"
"""A data plane may wait for the first bytes before it calls on."""
_QUERY = bytes((0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0))
"""A DNS message that asks nothing (opcode STATUS, no question; RFC 1035, 4.1.1): a server answers that with an error
by itself, and has nothing to ask another for."""
_LOOKS, _LOOK_SECONDS = 20, 0.01
_RESPONSE = 0x80
_SERVFAIL = 2
_PASSED_BY_MARK = b"\0by"
_PROTOCOLS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}


class Attempt:
    """One probe under way."""

    def __init__(self, probe: Probe, client: socket.socket) -> None:
        self.probe = probe
        self.client = client
        self.began = time.monotonic()
        self.connected: float | None = None
        self.waited_since: float | None = None
        """When that was, by the clock of the sender's patience."""
        self.error: OSError | None = None
        self.owner: int | None = None
        """Who has the other end, where that has to be asked."""
        self.closed = self.answered = self.reached = self.direct = self.stood_in = False
        self.has_destination = False
        """Whether a socket of ours is its destination, so that it shows whether the data plane calls on."""

    @property
    def query(self) -> bytes:
        """Its DNS message, which no other probe has."""
        return (self.probe.connection.source_port or 0).to_bytes(2, "big") + _QUERY[2:]

    @property
    def is_over(self) -> bool:
        """Whether nothing more has to be waited for."""
        if self.error is not None or self.direct or self.answered:
            return True
        return self.connected is not None and (self.stood_in or self.reached or not self.has_destination)


class Sender:
    """Sends probes over a cable, or through bridges, to the places that were opened for them."""

    def __init__(
        self, outside: Outside, places: Sequence[Place], audience: Audience, host: Namespace, proxy_uid: int
    ) -> None:
        self._proxy_uid = proxy_uid
        self._outside = outside
        self._audience = audience
        self._host = host
        self._places = places
        self._accepted: list[socket.socket] = []
        self._flows: list[tuple[Flow, int, int]] = []
        self._attempts: list[Attempt] = []
        self._is_unfinished = self._is_astray = False
        """Whether the data plane may still call on; whether somebody may wait for a packet that does not come."""
        self._selector = selectors.DefaultSelector()
        for place in places:
            self._selector.register(place.socket, selectors.EVENT_READ, place)

    def send(self, probes: Iterable[Probe], alive: int | None = None) -> list[tuple[Probe, Outcome]]:
        """The probes as they were sent, and their ends. Stops when `alive`, a descriptor, becomes readable."""
        self._attempts = []
        ended: dict[int, tuple[Probe, Outcome]] = {}
        wanted = list(probes)
        for number, probe in enumerate(wanted):
            try:
                self._attempts.append(self._begin(probe))
            except OSError as error:
                ended[number] = (probe, _failed(error))
        try:
            self._watch(alive)
        except BaseException:
            self._is_unfinished = True
            raise
        rest = iter(self._attempts)
        results = [ended[number] if number in ended else self._end(next(rest)) for number in range(len(wanted))]
        self._reset()
        return results

    def _reset(self) -> None:
        """End every connection of a round, at both ends, while its packets still get there."""
        self._is_unfinished |= any(one.connected and not one.stood_in and not one.reached for one in self._attempts)
        self._is_astray |= any(one.connected is None for one in self._attempts)
        for ours in (*(attempt.client for attempt in self._attempts), *self._accepted):
            ours.close()
        self._accepted = []

    def close(self) -> None:
        """Let everything go, and conntrack forget it."""
        self._reset()
        if self._is_unfinished:
            self._linger()
        if self._is_unfinished or self._is_astray:
            aftermath.end(self._outside.addresses())
        self._selector.close()
        for place in self._places:
            place.socket.close()
        with contextlib.suppress(OSError):
            for flow, protocol, zone in dict.fromkeys(self._flows):
                conntrack.forget(flow, protocol, zone)

    def _linger(self) -> None:
        """Give the data plane the time to call on what it has taken: without the cable, it would call elsewhere."""
        self._attempts = []
        waited = Waited()
        while (left := CARRY_SECONDS - waited.look()) > 0:
            for key, _ in self._selector.select(min(left, LOOK_SECONDS)):
                if isinstance(key.data, Place):
                    self._ready(key.data)
        self._reset()

    def _begin(self, probe: Probe) -> Attempt:
        connection = probe.connection
        protocol, family = Protocol(connection.protocol), probe.family
        with (self._outside.space(probe) or self._host).inside(connection.uid or 0):
            client = new_socket(protocol, family)
        try:
            if family is Family.IPV4 and probe.kind is Kind.DNS:
                client.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TYPE_OF_SERVICE)
            client.bind((str(connection.source), 0))
            port = int(client.getsockname()[1])
            sent = dataclasses.replace(probe, connection=dataclasses.replace(connection, source_port=port))
            attempt = Attempt(sent, client)
            attempt.has_destination = any(_same(probe, meant) for place in self._places for meant in place.probes)
            self._note(sent)
            with contextlib.suppress(BlockingIOError):
                client.connect((str(connection.destination), connection.destination_port))
            if protocol is Protocol.UDP:
                client.send(attempt.query)
        except OSError:
            client.close()
            raise
        events = selectors.EVENT_READ if protocol is Protocol.UDP else selectors.EVENT_WRITE
        self._selector.register(client, events, attempt)
        return attempt

    def _went_to_local_server(self, attempt: Attempt) -> bool:
        """Whether a query to a server on this host was answered by that one, for which no socket of ours stands."""
        if attempt.connected is None or self._outside.is_called_by(attempt.probe):
            return False
        flow, protocol, zone = self._flow(attempt.probe)
        with contextlib.suppress(OSError):
            # Without the redirection there are no zones, either. SNAT may change the other fields.
            reply = conntrack.reply_of(flow, protocol, zone) or conntrack.reply_of(flow, protocol, 0)
            return reply is not None and reply.source_port == flow.destination_port
        return False

    def _note(self, probe: Probe) -> None:
        flow, protocol, zone = self._flow(probe)
        self._flows += [(flow, protocol, zone), (flow, protocol, 0)]

    @staticmethod
    def _flow(probe: Probe) -> tuple[Flow, int, int]:
        c = probe.connection
        assert c.source_port is not None
        assert c.destination_port is not None
        flow = Flow(c.source.packed, c.source_port, c.destination.packed, c.destination_port)
        return flow, _PROTOCOLS[Protocol(c.protocol)], probe.expected.zone

    def _watch(self, alive: int | None) -> None:
        if alive is not None:
            self._selector.register(alive, selectors.EVENT_READ, None)
        waited = Waited()
        try:
            while pending := [one for one in self._attempts if not one.is_over]:
                now = waited.look()
                for one in pending:
                    if one.connected is not None and one.waited_since is None:
                        one.waited_since = now
                since = [one.waited_since for one in pending]
                if now >= max(PATIENCE_SECONDS if one is None else one + CARRY_SECONDS for one in since):
                    break
                for key, _ in self._selector.select(LOOK_SECONDS):
                    if key.data is None:
                        raise InterruptedError(errno.EINTR, "the command has gone")
                    self._ready(key.data)
        finally:
            if alive is not None:
                self._selector.unregister(alive)

    def _ready(self, what: Place | Attempt) -> None:
        if isinstance(what, Attempt):
            self._client_ready(what)
        elif what.socket.type == socket.SOCK_DGRAM:
            self._query_came(what)
        else:
            self._connection_came(what)

    def _client_ready(self, attempt: Attempt) -> None:
        client = attempt.client
        if attempt.probe.connection.protocol == Protocol.UDP:
            try:
                answer = client.recv(512)
            except BlockingIOError:
                return
            except OSError as error:
                attempt.error = error
            else:
                attempt.answered = True
                attempt.connected = time.monotonic()
                attempt.direct |= answer.endswith(_PASSED_BY_MARK)
            self._selector.unregister(client)
            return
        if number := client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._selector.unregister(client)
            if attempt.connected is None and number == errno.ECONNRESET:  # it was taken, and closed before this look
                attempt.connected = time.monotonic()
            elif attempt.connected is None:
                attempt.error = OSError(number, "")
            attempt.closed = True
            return
        if attempt.connected is None:
            attempt.connected = time.monotonic()
            self._selector.modify(client, selectors.EVENT_READ, attempt)
            if attempt.has_destination:
                with contextlib.suppress(OSError):
                    client.send(_HELLO)
            return
        with contextlib.suppress(BlockingIOError):
            try:
                attempt.closed = not client.recv(512)
            except ConnectionError:
                attempt.closed = True
        if attempt.closed:
            self._selector.unregister(client)

    def _query_came(self, place: Place) -> None:
        try:
            query, peer = place.socket.recvfrom(512)
        except OSError:
            return
        if len(query) < len(_QUERY):
            return
        answer = query[:2] + bytes((query[2] | _RESPONSE, _SERVFAIL)) + query[4:12]
        for attempt in self._attempts:
            if place.is_stand_in and query == attempt.query and attempt.probe.family is place.family:
                attempt.stood_in = True
        with contextlib.suppress(OSError):
            place.socket.sendto(answer + (b"" if place.is_stand_in else _PASSED_BY_MARK), peer)

    def _connection_came(self, place: Place) -> None:
        try:
            accepted, peer = place.socket.accept()
        except OSError:
            return
        self._accepted.append(accepted)
        attempt = self._attempt_from(peer)
        if place.is_stand_in:
            if attempt:
                attempt.stood_in = True
            return
        local = accepted.getsockname()
        flow = Flow(ip_address(peer[0]).packed, int(peer[1]), ip_address(local[0]).packed, int(local[1]))
        self._flows.append((flow, socket.IPPROTO_TCP, 0))
        if attempt and _is_destination(attempt.probe, local):
            attempt.direct = True
        for one in self._attempts:
            if any(_same(one.probe, meant) for meant in place.probes):
                one.reached |= not one.direct

    def _attempt_from(self, peer: tuple[str, int]) -> Attempt | None:
        """The probe whose own address and port the peer has; queries may come from the local address (rule d5)."""
        address, port = ip_address(peer[0]), int(peer[1])
        for one in self._attempts:
            connection = one.probe.connection
            if connection.source_port == port and (connection.source == address or address.is_loopback):
                return one
        return None

    def _end(self, attempt: Attempt) -> tuple[Probe, Outcome]:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(attempt.client)
        if attempt.probe.kind is Kind.INBOUND and attempt.connected and not attempt.has_destination:
            attempt.owner = _owner(attempt)
        if attempt.probe.is_query and self._went_to_local_server(attempt):
            attempt.direct = True
        attempt.client.close()
        seconds = (attempt.connected or time.monotonic()) - attempt.began
        fate, detail = self._fate(attempt)
        return attempt.probe, Outcome(fate, seconds, detail)

    def _fate(self, attempt: Attempt) -> tuple[Fate, str]:
        connection, port = attempt.probe.connection, attempt.probe.expected.port
        where = f"{connection.protocol} port {port}"
        if attempt.stood_in and (attempt.answered or attempt.connected is not None):
            return Fate.REFUSED, f"nobody listens on {where}; the way there is open"
        if attempt.direct:
            return Fate.PASSED_BY, "it went straight to its destination, past the data plane"
        if attempt.error is not None:
            return self._refused(attempt, where)
        if connection.protocol == Protocol.UDP and attempt.answered:
            return Fate.ARRIVED, "the data plane answered"
        if attempt.connected is None:
            came = (
                "the query reached the data plane's port, but the answer did not come back"
                if (attempt.stood_in)
                else "no answer at all came"
            )
            return Fate.LOST, f"{came} within {PATIENCE_SECONDS:g} s; it should have gone to {where}"
        if attempt.reached:
            return Fate.ARRIVED, "end to end: the data plane took it, and called the destination on"
        if attempt.owner not in (None, self._proxy_uid):
            return Fate.PASSED_BY, f"a socket of uid {attempt.owner} took it, which is not the data plane's"
        if not attempt.has_destination:
            return Fate.ARRIVED, f"the data plane took it on {where}"
        what = "closed it" if attempt.closed else f"did not call the destination on within {CARRY_SECONDS:g} s"
        return Fate.ARRIVED, f"at the data plane, which took it on {where} and {what}"

    def _refused(self, attempt: Attempt, where: str) -> tuple[Fate, str]:
        """A refusal: of the kernel, because nobody listens; or of somebody on the way."""
        port, family = attempt.probe.expected.port, attempt.probe.family
        assert attempt.error is not None
        assert port is not None
        if attempt.error.errno != errno.ECONNREFUSED:
            return Fate.LOST, f"{_text(attempt.error)}; it should have gone to {where}"
        protocol = Protocol(attempt.probe.connection.protocol)
        found = self._audience.at(protocol, port, family)
        wide = [one for one in found if one.address.is_unspecified and one.address.version == family]
        if found and not wide:
            bound = ", ".join(f"{one.address}{_ONLY if one.address.version != family else ''}" for one in found)
            return Fate.REFUSED, f"what listens on {where} is bound to {bound} and does not take it"
        if not found and not any(place.stands_for(protocol, port, family) for place in self._places):
            return Fate.REFUSED, f"nobody listens on {where}"
        return Fate.LOST, f"something on the way to {where} refused it, although somebody listens there"


_ONLY = " for IPv6 only"
"""What a socket is that is bound to an address of IPv6, and refuses IPv4."""


def _same(sent: Probe, meant: Probe) -> bool:
    """Whether one is the other as it was sent."""
    one, other = sent.connection, meant.connection
    same = (sent.kind, one.protocol, one.destination, one.destination_port)
    return same == (meant.kind, other.protocol, other.destination, other.destination_port)


def _owner(attempt: Attempt) -> int | None:
    """The uid of the socket that took a connection from elsewhere, once somebody has accepted it."""
    connection = attempt.probe.connection
    for _ in range(_LOOKS):
        found = sockets.owner_of(connection.source.packed, connection.source_port or 0)
        if found is not None:
            return found
        time.sleep(_LOOK_SECONDS)
    return None


def _is_destination(probe: Probe, local: tuple[str, int]) -> bool:
    connection = probe.connection
    return (connection.destination, connection.destination_port) == (ip_address(local[0]), int(local[1]))


def _text(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "?") if not error.strerror else error.strerror


def _failed(error: OSError) -> Outcome:
    return Outcome(Fate.LOST, 0.0, f"the kernel does not send it: {_text(error)}")
