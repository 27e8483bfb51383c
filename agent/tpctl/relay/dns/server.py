"""The DNS side of one worker: what `tpctl.relay.process.worker` uses of the modules `dns*`."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from tpctl.relay.connections.dials import SelfDialGuard
from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.dns.forwarder import DnsForwarder
from tpctl.relay.dns.local import LocalZone
from tpctl.relay.dns.neighbours import Neighbours
from tpctl.relay.dns.resolvers import ResolvConf
from tpctl.relay.dns.tcp import DnsStreams
from tpctl.relay.dns.tcp_upstream import Shared
from tpctl.relay.dns.upstreams import Upstreams
from tpctl.relay.loop.complaints import Complaints
from tpctl.relay.loop.descriptors import unlimited
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.loop.shares import Shares
from tpctl.relay.settings.dns import DnsSettings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class DnsServer:
    """Answers queries from the local zone, and forwards all others."""

    def __init__(
        self,
        loop: Loop,
        settings: DnsSettings,
        guard: SelfDialGuard,
        log: FilteringBoundLogger,
        descriptors: Shares | None = None,
    ) -> None:
        """Without `descriptors` there are as many as anybody wants."""
        descriptors = descriptors or unlimited()
        complaints = Complaints(log)
        self.counters = DnsCounters()
        self._neighbours = Neighbours(complaints)
        self._zone = LocalZone(settings, loop, self.counters, log)
        self._settings = settings
        self._resolv_conf = ResolvConf(settings.resolv_conf)
        self._over_udp = Upstreams(self._resolv_conf, guard, complaints)
        self._over_tcp = Upstreams(self._resolv_conf, guard, complaints)
        self._udp = DnsForwarder(
            loop,
            self._over_udp,
            local_answer=self._zone.answer,
            remembered=self._zone.remembered,
            counters=self.counters,
            complaints=complaints,
            descriptors=descriptors,
        )
        shared = Shared(loop, self._over_tcp, self.counters, set())
        self._tcp = DnsStreams(shared, self._zone.answer, complaints, descriptors)
        self._turn = itertools.count()

    @property
    def busy(self) -> int:
        """How many queries wait for an answer."""
        return self._udp.busy + self._tcp.busy

    def use(self, settings: DnsSettings) -> None:
        """Go on by other settings. A zone file is read in the background; when it is unusable, the last zone stays."""
        if settings.resolv_conf != self._settings.resolv_conf:
            self._resolv_conf = ResolvConf(settings.resolv_conf)
        self._over_udp.use(self._resolv_conf)
        self._over_tcp.use(self._resolv_conf)
        self._zone.use(settings)
        self._settings = settings

    def listen(self, listener: socket.socket, allows: Callable[[str], bool] | None = None) -> None:
        """Serve a listener, over UDP (for which `packet_info.enable` was called) or TCP.

        `allows` says whether a client's address, as text and IPv4 in its own form, may ask; without it, this host and
        the networks it is attached to may. For a listener that is
        served already, it replaces the rule.
        """
        served = self._udp if listener.type == socket.SOCK_DGRAM else self._tcp
        served.listen(listener, allows or self._neighbours)

    def upstreams(self, destination: Destination) -> tuple[Destination, ...] | None:
        """What to dial, best first, for a connection to a virtual address of the zone; see `Vips.upstreams`.

        Several upstreams take turns.
        """
        found = self._zone.vips.upstreams(destination)
        if found is None or len(found) < 2:
            return found
        first = next(self._turn) % len(found)
        return found[first:] + found[:first]

    def leave(self, listener: socket.socket) -> None:
        """Serve a listener no more. It is closed here."""
        if listener.type == socket.SOCK_DGRAM:
            self._udp.leave(listener)
        else:
            self._tcp.leave(listener)

    def drain(self, idle: Callable[[], None], *, leave_waiting: bool = False) -> None:
        """Take no more queries; `idle` is called whenever the last one has been answered.

        `leave_waiting` leaves what has not been read yet to whoever else has the listeners.
        """
        self._udp.drain(leave_waiting=leave_waiting)
        self._tcp.drain(leave_waiting=leave_waiting)
        self._udp.idle = self._tcp.idle = idle

    def reset(self) -> None:
        """Give up every query."""
        self._udp.reset()
        self._tcp.reset()
