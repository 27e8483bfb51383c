"""The small pieces of Envoy's language that everything else is made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Network, ip_network
from typing import Any

from tpctl.envoy.documents import TYPE, Resource
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.partition import minus
from tpctl.spec.policy import Network

_MAPPED = IPv6Network("::ffff:0:0/96")
"""IPv4 addresses written as IPv6 (RFC 4291, 2.5.5.2)."""
APART = "~"
"""Between the parts of a resource's name: no name in the settings has one."""


def extension(name: str, kind: str, **fields: Any) -> Resource:
    """An extension's configuration: `kind` is its type's name below envoy.extensions."""
    return {"name": name, "typed_config": typed(kind, **fields)}


def typed(kind: str, **fields: Any) -> Resource:
    """A message that says of which type it is."""
    return {"@type": f"{TYPE}extensions.{kind}", **fields}


def cidrs(networks: Iterable[Network]) -> list[Resource]:
    """CidrRange. An empty list would match everybody, so there must be one."""
    found = [{"address_prefix": str(one.network_address), "prefix_len": one.prefixlen} for one in networks]
    assert found
    return found


def clients(networks: Iterable[Network]) -> list[Resource]:
    """CidrRange for addresses that a PROXY protocol header or X-Forwarded-For may name.

    A proxy that listens for both families on one socket, as HAProxy with `v4v6`, writes ::ffff:192.0.2.1 for 192.0.2.1.
    Rules for 192.0.2.1 hold for that one as well, and rules for IPv6 do not.
    """
    networks = tuple(networks)
    mapped = [
        ip_network((_MAPPED.network_address + int(one.network_address), one.prefixlen + 96))
        for one in networks
        if one.version == 4
    ]
    return cidrs(minus([*minus(networks, [_MAPPED]), *mapped], ()))


def socket_address(host: str, port: int) -> Resource:
    """An Address; port 0 is any."""
    return {"socket_address": {"address": host, "port_value": port}}


def address_of(destination: Destination) -> Resource:
    """The Address of a destination."""
    return socket_address(destination.host, destination.port)


def duration(seconds: float) -> str:
    """A Duration. 0 is none, for Envoy as in the settings."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def endpoints(name: str, address: Resource) -> Resource:
    """The load_assignment of a cluster with one address."""
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}
