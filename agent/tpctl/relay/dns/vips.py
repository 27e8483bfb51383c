"""Virtual addresses: what the local zone answers with, and where connections to them really go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpctl.relay.loop.original_destination import Destination

ANY_PORT = 0
"""Stands for the ports that a virtual address does not name; as the port of an upstream, for the one that was dialled.

Nobody can connect to port 0, so it means nothing else.
"""

Upstreams = Mapping[int, tuple[Destination, ...]]
"""The upstream addresses by the port that is dialled, or `ANY_PORT`."""


@dataclass(frozen=True, slots=True)
class Vips:
    """The virtual addresses of a zone, as text in the form of inet_ntop(3)."""

    by_host: Mapping[str, Upstreams] = field(default_factory=dict)

    def upstreams(self, destination: Destination) -> tuple[Destination, ...] | None:
        """Where a connection to `destination` goes, best first.

        None when that is no virtual address, so that it is dialled itself; empty when it is one on which nothing is
        served at this port.

        >>> vips = Vips({"240.0.0.1": {80: (Destination("10.0.0.5", 8080),)}})
        >>> vips.upstreams(Destination("240.0.0.1", 80))
        (Destination(host='10.0.0.5', port=8080, family=<AddressFamily.AF_INET: 2>, scope=0),)
        >>> vips.upstreams(Destination("240.0.0.1", 81)), vips.upstreams(Destination("192.0.2.1", 80))
        ((), None)
        """
        ports = self.by_host.get(destination.host)
        if ports is None:
            return None
        found = ports.get(destination.port) or ports.get(ANY_PORT, ())
        return tuple(each if each.port else each._replace(port=destination.port) for each in found)
