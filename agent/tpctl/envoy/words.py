"""The small pieces of Envoy's language that everything else is made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tpctl.envoy.documents import TYPE, Resource
from tpctl.relay.loop.original_destination import Destination
from tpctl.spec.policy import Network

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
