"""Whether an address is one of this host's own, or near: what `tpctl.host.routes` says, as the relay asks for it.

The kernel is asked each time, so nothing has to be kept up to date.
"""

from __future__ import annotations

import socket

from tpctl.host import routes
from tpctl.host.routes import Route
from tpctl.relay.loop.original_destination import Destination


def is_local(destination: Destination) -> bool:
    """Whether connecting to the address stays on this host. True if nobody can tell: not dialling is safe."""
    try:
        route = _route(destination)
    except OSError:
        return True
    return route is not None and route.is_local


def is_surely_local(destination: Destination) -> bool:
    """The same, but False when the kernel cannot be asked: for whom something is admitted that others are refused."""
    try:
        route = _route(destination)
    except OSError:
        return False
    return route is not None and route.is_local


def is_near(host: str) -> bool:
    """Whether an address is this host's own, or is reached without a router. True when the kernel cannot be asked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        route = _route(Destination(host.partition("%")[0], 0, family))
    except OSError:
        return True
    return route is not None and route.is_near


def _route(destination: Destination) -> Route | None:
    packed = socket.inet_pton(destination.family, destination.host)
    return routes.route_to(packed, interface=destination.scope)
