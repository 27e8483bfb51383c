"""From an accepted socket to a client that is known: its PROXY protocol header, then its TLS handshake."""

from __future__ import annotations

import errno
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tpctl.relay.connections.dials import Dial
from tpctl.relay.connections.ends import TlsEnd
from tpctl.relay.connections.greeting import Greeting
from tpctl.relay.connections.handshake import Handshake
from tpctl.relay.connections.proxy_protocol import Header
from tpctl.relay.connections.route import Peer, Refusal, Route
from tpctl.relay.connections.tls import Tls
from tpctl.relay.connections.waiting_room import WaitingRoom
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.failures import shown
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination, from_socket_name, recover, unmapped
from tpctl.relay.settings.model import Source

_HANDSHAKE = {
    errno.ETIMEDOUT: Refusal.TIMED_OUT,
    errno.ECONNABORTED: Refusal.ENDED,
    errno.EIO: Refusal.FAILED,
}
"""Why a handshake was ended that has not failed by itself."""
_UNKNOWN = Destination("0.0.0.0", 0)
"""The original destination of what came to a unix socket."""


class Guest:
    """A client that was accepted: who it is, where it wanted to go, and when it came."""

    __slots__ = (
        "again",
        "counted",
        "destination",
        "dials",
        "end",
        "gone",
        "header",
        "hops",
        "is_translated",
        "moved",
        "peer",
        "route",
        "sender",
        "since",
        "socket",
        "use",
    )

    def __init__(self, sock: Socket, route: Route, peer: Peer, destination: Destination) -> None:
        self.socket = sock
        self.route = route
        self.peer = peer
        self.destination = destination
        self.is_translated = False
        """Whether NAT brought it here, as far as anybody asks: then nobody brings answers to its address back."""
        self.since = time.monotonic()
        self.header: Header | None = None
        """What it began with, where the PROXY protocol is spoken."""
        self.sender: Peer | None = None
        """Who sent that: then `peer` is whom it names."""
        self.end: TlsEnd | None = None
        """Its end of the connection, where it speaks TLS."""
        self.moved = (0, 0)
        """Bytes to the upstream and to the client that have been counted."""
        self.counted: str | None = None
        """The source under which it is counted, if its connections are limited."""
        self.use: int | None = None
        """Whose descriptors it takes (`tpctl.relay.loop.descriptors`)."""
        self.gone = False
        """Whether it is counted no more."""
        self.hops = 0
        """How often it may have gone through the relay already."""
        self.dials: Sequence[Dial] = ()
        """What to dial for it, once that is decided."""
        self.again: Dial | None = None
        """For a dial of the relay's own that the kernel has brought back: what to dial once more, and nothing else."""

    @classmethod
    def accepted(cls, sock: Socket, name: Any, route: Route) -> Guest:
        """With what the kernel knows of it; `name` is what accept() returned. Raises OSError if it has gone."""
        if isinstance(name, tuple):
            guest = cls(sock, route, Peer(unmapped(name[0]), name[1]), recover(sock, name[0]))
            if route.settings.source is Source.CLIENT:
                guest.is_translated = from_socket_name(sock.getsockname()) != guest.destination
            return guest
        return cls(sock, route, Peer(None, 0), _UNKNOWN)


class Reception:
    """Hears what clients have to say before anything is dialled for them. Calls `admit` or `refuse` once for each.

    `judge` is asked as soon as it is known who the client is: nobody who is refused anyway costs a TLS handshake.
    """

    def __init__(
        self,
        loop: Loop,
        judge: Callable[[Guest], Refusal | None],
        admit: Callable[[Guest], None],
        refuse: Callable[[Guest, Refusal, str | None], None],
    ) -> None:
        self._loop = loop
        self._judge = judge
        self._admit = admit
        self._refuse = refuse
        self._waiting = WaitingRoom[Guest](loop, self._go_on)
        self._greetings: set[Greeting] = set()
        self._handshakes: set[Handshake] = set()
        self._greeting_deadlines: dict[float, Deadlines[Greeting]] = {}
        self._handshake_deadlines: dict[float, Deadlines[Handshake]] = {}

    @property
    def busy(self) -> int:
        """How many clients are being heard."""
        return len(self._greetings) + len(self._handshakes) + len(self._waiting)

    def receive(self, guest: Guest) -> None:
        """Begin with a client, once it is known whether it is one."""
        must_wait = guest.route.may_be_brought_back(guest.peer, guest.destination)
        if must_wait is None:
            self._recognise(guest)
        else:
            self._waiting.enter(guest, must_wait)

    def _go_on(self, guest: Guest) -> None:
        """Nothing is missing any more, and nobody is there to be told of an error."""
        try:
            self._recognise(guest)
        except OSError as error:
            self._refuse(guest, Refusal.GONE, error.strerror)
        except Exception as error:  # noqa: BLE001 - contained
            self._loop.contain(error, partial(self._recognise, guest))

    def _recognise(self, guest: Guest) -> None:
        guest.again, guest.hops = guest.route.brought_back(guest.peer, guest.destination, guest.socket)
        refusal = guest.route.refuses_to_hear(guest.peer, guest.again)
        if refusal is not None:
            self._refuse(guest, refusal, None)
        elif guest.again is not None:
            self._admit(guest)
        elif guest.route.settings.listen.proxy_protocol:
            self._greet(guest)
        else:
            self._secure(guest)

    def break_off(self, error: Exception, guest: Guest) -> None:
        """Refuse a client because of an error that nobody expected (`Loop.contain`)."""
        self._refuse(guest, Refusal.FAILED, shown(error))

    def reset(self, error: OSError) -> None:
        """Refuse everybody who is being heard, for `error`: ECONNABORTED."""
        for guest in self._waiting.everybody():
            self._waiting.leave(guest)
            self._refuse(guest, Refusal.ENDED, None)
        for greeting in tuple(self._greetings):
            greeting.end(Refusal.ENDED)
        for handshake in tuple(self._handshakes):
            handshake.finish(error)

    def _greet(self, guest: Guest) -> None:
        """Wait for the PROXY protocol header, and go on with whom it names."""

        def done(refusal: Refusal | None) -> None:
            deadlines.discard(greeting)
            self._greetings.discard(greeting)
            header = greeting.reader.header
            if refusal is not None or header is None:
                self._refuse(guest, refusal or Refusal.MALFORMED, None)
                return
            guest.header, guest.sender = header, guest.peer
            guest.destination = guest.route.meant(guest.destination, header)
            if header.source is not None:
                guest.peer = Peer(header.source.host, header.source.port)
            self._secure(guest)

        seconds = guest.route.settings.timeouts.handshake
        deadlines = self._greeting_deadlines.setdefault(seconds, Deadlines(self._loop, seconds, _too_late))
        greeting = Greeting(self._loop, guest.socket, done)
        self._greetings.add(greeting)
        deadlines.add(greeting)
        greeting.start()

    def _secure(self, guest: Guest) -> None:
        """Begin TLS, where the listener has it, and admit the client then."""
        refusal = self._judge(guest)
        if refusal is not None:
            self._refuse(guest, refusal, None)
        elif guest.route.tls.clients is None:
            self._admit(guest)
        else:
            self._shake_hands(guest, guest.route.tls.clients)

    def _shake_hands(self, guest: Guest, tls: Tls) -> None:
        def done(error: OSError | None) -> None:
            deadlines.discard(handshake)
            self._handshakes.discard(handshake)
            if error is None:
                guest.end = handshake.end
                self._admit(guest)
            else:
                self._refuse(guest, _HANDSHAKE.get(error.errno or 0, Refusal.TLS), told(error))

        seconds = guest.route.settings.timeouts.handshake
        deadlines = self._handshake_deadlines.setdefault(seconds, Deadlines(self._loop, seconds, Handshake.expire))
        handshake = Handshake(self._loop, guest.socket, TlsEnd(guest.socket, tls), done)
        self._handshakes.add(handshake)
        deadlines.add(handshake)
        handshake.start()


def _too_late(greeting: Greeting) -> None:
    greeting.end(Refusal.TIMED_OUT)


def told(error: OSError) -> str:
    """An error as the log shows it. OpenSSL's carry more than the text of a number."""
    if isinstance(error, ssl.SSLError):
        return str(getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.args[-1])
    return error.strerror or str(error)
