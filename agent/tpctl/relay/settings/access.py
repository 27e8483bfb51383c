"""Who may use a listener, and what may be dialled for them. Pure."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from tpctl.relay.loop.networks import NONE, NetworkSet
from tpctl.relay.loop.original_destination import Destination

METADATA = NetworkSet.of(
    "169.254.169.254/32",  # AWS, Azure, Google, OpenStack, DigitalOcean, Hetzner and others
    "169.254.170.2/32",  # AWS ECS: credentials of a task
    "169.254.170.23/32",  # AWS EKS: credentials of a pod
    "169.254.0.23/32",  # Tencent
    "100.100.100.200/32",  # Alibaba
    "192.0.0.192/32",  # Oracle, first generation
    "fd00:ec2::254/128",  # AWS
    "fd00:ec2::23/128",  # AWS EKS
    "fd20:ce::254/128",  # Google
    "fe80::a9fe:a9fe/128",  # OpenStack
)
"""Where cloud providers hand out a machine's credentials to whoever asks from it."""

_REMEMBERED = 4096
"""Addresses that were looked at: parsing one costs a twentieth of a connection."""

NAT64 = bytes.fromhex("0064ff9b0000000000000000")
"""RFC 6052: the well-known prefix, behind which a translator reaches IPv4 addresses."""


@dataclass(frozen=True, slots=True)
class Access:
    """Allowed and denied networks. What is denied stays denied even if it is allowed as well."""

    allow: NetworkSet = NONE
    deny: NetworkSet = NONE
    default_allow: bool = True
    """What happens to an address that is in neither."""

    def admits(self, host: str) -> bool:
        """Whether an address may pass."""
        if self.deny and host in self.deny:
            return False
        return self.default_allow or host in self.allow


EVERYBODY = Access()


@lru_cache(maxsize=_REMEMBERED)
def is_metadata(destination: Destination) -> bool:
    """Whether an address belongs to a cloud's metadata service, also when a NAT64 gateway would translate it."""
    if destination.family == socket.AF_INET6:
        packed = IPv6Address(destination.host).packed
        if packed.startswith(NAT64):
            return socket.inet_ntop(socket.AF_INET, packed[-4:]) in METADATA
    return destination.host in METADATA


def reaches_loopback_from_afar(
    destination: Destination, client: str | None, is_local: Callable[[Destination], bool]
) -> bool:
    """Whether a client on another host would reach what listens on this host's loopback addresses only.

    `client` is None for a unix socket, whose clients are on this host. `is_local` is asked for loopback destinations
    only, so it may be slow.
    """
    return _means_this_host(destination.host) and _is_afar(destination, client, is_local)


def reaches_neighbours_from_afar(
    destination: Destination, client: str | None, is_local: Callable[[Destination], bool]
) -> bool:
    """Whether a client on another host would reach a link of this host by a link-local address that it only names.

    Routers forward no such packets (RFC 3927, 2.7; RFC 4291, 2.5.6), so it could not get there by itself.
    """
    return _is_link_local(destination.host) and not is_local(destination) and _is_afar(destination, client, is_local)


def _is_afar(destination: Destination, client: str | None, is_local: Callable[[Destination], bool]) -> bool:
    if client is None:
        return False
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    return not is_local(Destination(client, destination.port, family))


@lru_cache(maxsize=_REMEMBERED)
def _means_this_host(host: str) -> bool:
    address = ip_address(host)
    return address.is_loopback or address.is_unspecified


@lru_cache(maxsize=_REMEMBERED)
def _is_link_local(host: str) -> bool:
    return ip_address(host).is_link_local
