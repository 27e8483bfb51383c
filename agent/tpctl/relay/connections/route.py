"""What becomes of a connection that a listener got: what to dial for it, or why not. Decides, and does nothing."""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

from tpctl.relay.connections import client_ports, dials
from tpctl.relay.connections.dialling import OwnDial, are_one, is_of_this_relay
from tpctl.relay.connections.dials import Dial, SelfDialGuard
from tpctl.relay.connections.hops import Hops, Link
from tpctl.relay.connections.proxy_protocol import Header
from tpctl.relay.connections.tls import ListenerTls
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.access import is_metadata, reaches_loopback_from_afar, reaches_neighbours_from_afar
from tpctl.relay.settings.model import FixedAddress, ListenerSettings, Role, ServicePorts, Source
from tpctl.relay.settings.upstream import at, named_upstreams
from tpctl.spec.policy import is_scoped

MAX_HOPS = 5
"""How often a dial may be brought back before it is a loop. By chance, each time a few in a hundred are, at worst."""
MAX_WORKERS_HOPS = 20
"""The same for connections that may be, of which nobody knows for certain."""


class Peer(NamedTuple):
    """The other end of an accepted connection, or whom its PROXY protocol header names."""

    host: str | None
    """None for a unix socket."""
    port: int

    def __str__(self) -> str:
        return self.host or "unix:"


class Refusal(enum.StrEnum):
    """Why a connection is not passed on."""

    COMES_BACK = "refused: the relay's own connections come back to it; does it run as the policy's data plane user?"
    OWN_PORT = "refused: a connection to the relay's own port that was not redirected"
    SOURCE = "refused: the source is denied"
    DESTINATION = "refused: the destination is denied"
    METADATA = "refused: a cloud's metadata service; to dial it, set allow_metadata_addresses"
    LOOPBACK = "refused: a client on another host asks for a loopback address of this one"
    LINK_LOCAL = "refused: a PROXY protocol header from, or for, another host names a link-local address"
    NO_UPSTREAM = "refused: a virtual address that has no upstream for this port"
    TOO_MANY = "refused: the source has too many connections"
    NO_ROOM = "refused: out of resources for connections that other hosts make through this one"
    UNTRUSTED = "refused: the source may not send PROXY protocol headers; see trusted_ips"
    MALFORMED = "refused: no valid PROXY protocol header"
    TIMED_OUT = "refused: the PROXY protocol header or TLS handshake did not come in time"
    TLS = "refused: the TLS handshake failed"
    GONE = "the client left before it was served"
    ENDED = "ended by the relay before it was served"
    FAILED = "refused: an error of the relay's own"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every route of a worker asks."""

    guard: SelfDialGuard
    own_dials: Mapping[Link, OwnDial]
    hops: Hops
    vips: Callable[[Destination], Sequence[Destination] | None]
    """What to dial for a virtual address of the local DNS zone; None for all other destinations."""
    is_local: Callable[[Destination], bool]
    """True for what nobody knows, for instance when there are no descriptors left."""
    is_surely_local: Callable[[Destination], bool]
    """False for that."""


class Route:
    """One listener's rules."""

    __slots__ = ("_elsewhere", "_surroundings", "settings", "slot", "tls")

    def __init__(self, settings: ListenerSettings, slot: int, surroundings: Surroundings, tls: ListenerTls) -> None:
        self.settings = settings
        self.tls = tls
        self.slot = slot
        """Of its counters, see `tpctl.relay.connections.tally`."""
        self._surroundings = surroundings
        named = named_upstreams(settings.upstream)
        self._elsewhere = frozenset(one.host for one in named if not surroundings.is_local(one))
        """Upstreams on other hosts, which could not answer 127.0.0.6."""

    def decide(
        self, peer: Peer, destination: Destination, *, sender: Peer | None = None, translated: bool = False
    ) -> Sequence[Dial] | Refusal:
        """What to dial, best first, for a client that wanted to go to `destination`.

        `sender` is who said in a PROXY protocol header that `peer` is the client. What this host alone can reach is
        for neither of them if it is on another host: a header is believed about the client, not about who sends it.
        `translated` connections were brought here by NAT, so that their client's address cannot be dialled from.
        """
        settings, around = self.settings, self._surroundings
        if settings.role is Role.INBOUND and peer.host and not settings.access.admits(peer.host):
            return Refusal.SOURCE
        if isinstance(settings.upstream, FixedAddress):
            if settings.role is Role.OUTBOUND and not settings.access.admits(destination.host):
                return Refusal.DESTINATION
            return self._dials(peer, settings.upstream.destination, sender, translated)
        behind = around.vips(destination) if settings.role is Role.OUTBOUND else None
        if behind is not None:
            return self._behind(peer, behind, sender)
        return self._refusal(peer, destination, sender) or self._dials(
            peer, self._service(destination), sender, translated
        )

    def _behind(self, peer: Peer, upstreams: Sequence[Destination], sender: Peer | None) -> Sequence[Dial] | Refusal:
        """What to dial for a virtual address: those of its upstreams that may be dialled."""
        if not upstreams:
            return Refusal.NO_UPSTREAM
        refusals = [self._refusal(peer, upstream, sender) for upstream in upstreams]
        admitted = [one for one, refusal in zip(upstreams, refusals, strict=True) if refusal is None]
        return (
            tuple(dial for one in admitted for dial in self._dials(peer, one, sender))
            or refusals[0]
            or Refusal.NO_UPSTREAM
        )

    def may_be_brought_back(self, peer: Peer, destination: Destination) -> Callable[[], bool] | None:
        """Whether it cannot be told yet, as something to ask again; None when `brought_back` can tell."""
        if peer.host is None:
            return None
        link, around = Link(peer.host, peer.port, destination), self._surroundings
        dials = around.hops.under_way(link)
        if not dials or link in around.own_dials:
            return None
        return partial(around.hops.are_under_way, dials, link)

    def brought_back(self, peer: Peer, destination: Destination, accepted: Socket) -> tuple[Dial | None, int]:
        """The dial of the relay whose far end a connection is, as it is to be dialled again; None for all others.

        The bytes it brings have been through everything already: access rules, PROXY protocol, TLS. Beside it, how
        often the connection may have gone through the relay.
        """
        if peer.host is None:
            return None, 0
        link, around = Link(peer.host, peer.port, destination), self._surroundings
        own = around.own_dials.get(link)
        if own is not None and are_one(own.socket, accepted):
            return own.dial._replace(hops=own.dial.hops + 1), own.dial.hops + 1
        hops = around.hops.of(link)
        if not hops or own is not None or not is_of_this_relay(link, accepted):
            return None, hops
        # Another worker's, of whose dial only the ends are known. What was dialled in a client's name is not ours.
        if not around.is_surely_local(at(peer.host, 0)):
            return None, hops
        return Dial(destination, peer.host if peer.host in dials.PASSTHROUGH.values() else None, hops=hops), hops

    def refuses_to_hear(self, peer: Peer, again: Dial | None) -> Refusal | None:
        """Why a connection from this very peer is refused, whatever it has to say. `again` is what was brought back."""
        if again is not None:
            return Refusal.COMES_BACK if again.hops > MAX_HOPS else None
        if self.settings.listen.proxy_protocol and peer.host not in self.settings.trusted_ips:
            return Refusal.UNTRUSTED
        return None

    def counting_hops(self, hops: int, found: Sequence[Dial]) -> Sequence[Dial] | Refusal:
        """Dials for a client that may be a dial of the relay, so that no loop lasts.

        There is no proof of that, but only in a loop does the number grow so far, and a number that is too high does no
        harm by itself.
        """
        if hops > MAX_WORKERS_HOPS:
            return Refusal.COMES_BACK
        return [dial._replace(hops=hops) for dial in found] if hops else found

    def meant(self, destination: Destination, header: Header) -> Destination:
        """Where a client wanted to go whose PROXY protocol header was read.

        A redirected connection went to the address before the redirection; what the header names is then an address of
        the proxy in front. One that was made to the listener itself goes where its header says.
        """
        direct = destination.port == 0 or self._surroundings.guard.refuses(destination)
        return header.destination if direct and header.destination is not None else destination

    def _refusal(self, peer: Peer, destination: Destination, sender: Peer | None) -> Refusal | None:
        settings, around = self.settings, self._surroundings
        if around.guard.refuses(destination):
            return Refusal.OWN_PORT
        if settings.role is Role.OUTBOUND and not settings.access.admits(destination.host):
            return Refusal.DESTINATION
        if not settings.allow_metadata_addresses and is_metadata(destination):
            return Refusal.METADATA
        for one in (peer,) if sender is None else (peer, sender):
            if reaches_loopback_from_afar(destination, one.host, around.is_surely_local):
                return Refusal.LOOPBACK
            if sender is not None and reaches_neighbours_from_afar(destination, one.host, around.is_surely_local):
                return Refusal.LINK_LOCAL
        return None

    def _service(self, destination: Destination) -> Destination:
        upstream = self.settings.upstream
        if not isinstance(upstream, ServicePorts):
            return destination
        address, port = upstream.of(destination.port)
        return destination._replace(port=port) if address is None else at(address, port)

    def _dials(
        self, peer: Peer, destination: Destination, sender: Peer | None, translated: bool = False
    ) -> Sequence[Dial]:
        source = self.settings.source
        if source is Source.CLIENT and peer.host and not translated and self._can_answer(destination, peer.host):
            return (Dial(destination, peer.host, transparent=True),)
        from_passthrough = source is Source.PASSTHROUGH or (source is Source.CLIENT and not self._is_away(destination))
        if from_passthrough and destination.host not in self._elsewhere:
            return dials.inbound(destination)
        if sender is None and self._is_privileged(peer):
            return (Dial(destination, privileged=True),)
        return dials.outbound(destination)

    def _is_privileged(self, peer: Peer) -> bool:
        """Whether the client needed a privilege on this host for its source port (ip(7)).

        The port of a client elsewhere proves nothing here.
        """
        if peer.port not in client_ports.PRIVILEGED or not peer.host:
            return False
        return self.settings.role is Role.OUTBOUND and self._surroundings.is_surely_local(at(peer.host, 0))

    def _is_away(self, destination: Destination) -> bool:
        return not self._surroundings.is_local(destination)

    def _can_answer(self, destination: Destination, client: str) -> bool:
        """Whether an answer to the client's address can be brought back to the relay (docs/ruleset.md, TPROXY).

        Not to an address of this host: such a connection comes from the data plane itself (o3), and would again.
        """
        if (":" in client) != (destination.family == socket.AF_INET6):
            return False
        if destination.host.startswith("127.") or destination.is_link_local or is_scoped(ip_address(client)):
            return False
        return self._is_away(destination._replace(host=client))
