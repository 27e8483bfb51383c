"""Sets of networks, asked for every connection: the cost grows with the number of prefix lengths, not of networks."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import ip_network

from tpctl.spec.policy import Network


class NetworkSet:
    """Networks of both families."""

    __slots__ = ("_by_shift4", "_by_shift6", "networks")

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self.networks = tuple(networks)
        """As they were given."""
        self._by_shift4: dict[int, set[int]] = {}
        self._by_shift6: dict[int, set[int]] = {}
        for network in self.networks:
            shifts = self._by_shift4 if network.version == 4 else self._by_shift6
            shift = network.max_prefixlen - network.prefixlen
            shifts.setdefault(shift, set()).add(int(network.network_address) >> shift)

    @classmethod
    def of(cls, *texts: str) -> NetworkSet:
        """The networks that are written so."""
        return cls(ip_network(text) for text in texts)

    def __contains__(self, host: object) -> bool:
        """Whether an address is in one of the networks; what is no address is in none."""
        if not isinstance(host, str):
            return False
        family, shifts = (socket.AF_INET6, self._by_shift6) if ":" in host else (socket.AF_INET, self._by_shift4)
        if not shifts:
            return False
        try:
            number = int.from_bytes(socket.inet_pton(family, host), "big")
        except OSError:
            return False
        return any(number >> shift in prefixes for shift, prefixes in shifts.items())

    def __bool__(self) -> bool:
        return bool(self.networks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetworkSet) and self.networks == other.networks

    def __hash__(self) -> int:
        return hash(self.networks)

    def __repr__(self) -> str:
        return f"NetworkSet.of({', '.join(repr(str(network)) for network in self.networks)})"


NONE = NetworkSet()
"""No network."""
