"""What the relay dials for a connection, and what it must not dial."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import Listen
from tpctl.spec.policy import DNS_PORT, RESERVED, Family, NameServer

_FAMILY = {socket.AF_INET: Family.IPV4, socket.AF_INET6: Family.IPV6}
PASSTHROUGH = {af: str(RESERVED[family].passthrough.network_address) for af, family in _FAMILY.items()}
LOCAL = {af: str(RESERVED[family].local.network_address) for af, family in _FAMILY.items()}

_REMEMBERED = 4096
"""Ways to reach somebody: connections to the same destination share them."""


class Dial(NamedTuple):
    """One attempt to reach somebody."""

    destination: Destination
    source: str | None = None
    """The address to dial from; None leaves the choice to the kernel."""
    substitute: Destination | None = None
    """What to dial, from any address, when this host does not have the source."""
    transparent: bool = False
    """The source is somebody else's address (IP_TRANSPARENT)."""
    privileged: bool = False
    """From a port below 1024, where this process may: the client has one, and servers may count on it."""
    hops: int = 0
    """How often the kernel has brought this very dial back to the relay, see `dialling.OwnDial`."""


@lru_cache(maxsize=_REMEMBERED)
def inbound(destination: Destination) -> tuple[Dial, ...]:
    """How to reach the application a client meant.

    The source is what tells the rules that the connection is the relay's (o2). Where that address is missing (::6 was
    not added to lo), dialling the client's destination without it would be captured again (o3), so the application is
    reached on the loopback address, which never is (o5).

    A link-local destination is dialled from itself, which the rules let through (s1): connect(2) ties the socket to
    the interface of that address, and answers to 127.0.0.6 or ::6 would come over lo, where nobody waits for them.
    """
    if destination.is_link_local:
        return outbound(destination)
    family = socket.AddressFamily(destination.family)
    return (Dial(destination, PASSTHROUGH[family], destination._replace(host=LOCAL[family], scope=0)),)


@lru_cache(maxsize=_REMEMBERED)
def outbound(destination: Destination) -> tuple[Dial, ...]:
    """How to reach the server an application meant."""
    return (Dial(destination),)


def name_server(server: NameServer) -> Destination:
    """Where a name server of resolv.conf is asked. Raises OSError when its interface does not exist."""
    if isinstance(server.address, type(ip_address("0.0.0.0"))):
        return Destination(str(server.address), DNS_PORT)
    scope = socket.if_nametoindex(server.interface) if server.interface else 0
    return Destination(str(server.address), DNS_PORT, socket.AF_INET6, scope)


@dataclass(slots=True)
class SelfDialGuard:
    """Knows the relay's own listeners. One that is bound to the wildcard address is reached at all of the host's."""

    ports: frozenset[int]
    is_local: Callable[[Destination], bool]
    """Asked only for the relay's own ports, so it may be slow."""
    bound: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By port: the only addresses it is served at. A port that is missing here is served at every address."""

    def watch(self, listens: Iterable[Listen]) -> None:
        """Know these listeners, and no others."""
        hosts: dict[int, set[str]] = {}
        for listen in listens:
            if isinstance(listen.address, Destination):
                hosts.setdefault(listen.address.port, set()).add("*" if listen.is_wildcard else listen.address.host)
        self.ports = frozenset(hosts)
        self.bound = {port: frozenset(names) for port, names in hosts.items() if "*" not in names}

    def refuses(self, destination: Destination) -> bool:
        """Whether dialling the destination would reach one of the relay's own listeners."""
        if destination.port not in self.ports:
            return False
        address = ip_address(destination.host)
        if address.is_unspecified:  # to connect(), that is the loopback address, or the one it dials from
            return True
        if destination.port in self.bound:
            return destination.host in self.bound[destination.port]
        return address.is_loopback or self.is_local(destination)

    def others(self, destinations: Iterable[Destination]) -> tuple[Destination, ...]:
        """Those that are not the relay itself, in order."""
        return tuple(destination for destination in destinations if not self.refuses(destination))
