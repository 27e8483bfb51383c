"""Everything outside this host that probes come from and go to: the cable's other end, and ports on bridges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tpctl.arrival import bridged
from tpctl.arrival.bridged import BridgePort
from tpctl.arrival.cable import Cable, Ends
from tpctl.arrival.model import Kind, Probe
from tpctl.arrival.plan import Behind, avoided
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.policy import Address, Policy


class Outside:
    """A context manager: at the end nothing of it is left. Raises HostError when there can be no cable."""

    def __init__(self, policy: Policy) -> None:
        with contextlib.ExitStack() as stack:
            self.cable = stack.enter_context(Cable(policy.families, lambda address: avoided(policy, address)))
            self.ports, self.missing = bridged.ports(policy, stack)
            """The ports, and why some virtual networks have none."""
            self._held = stack.pop_all()
        self._by_network = {(port.seat.bridge.name, port.seat.family): port for port in self.ports}

    def __enter__(self) -> Outside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove it all."""
        self._held.close()

    def port(self, probe: Probe) -> BridgePort | None:
        """The one that a probe comes from, if it is one of a virtual network."""
        if probe.kind is not Kind.VIRTUAL_NETWORK:
            return None
        return self._by_network[probe.connection.interface, probe.family]

    def ends(self, probe: Probe) -> Ends:
        """This host's address and the other, where a probe arrives or leaves."""
        port = self.port(probe)
        return port.seat.ends if port else self.cable.ends[probe.family]

    def space(self, probe: Probe) -> Namespace | None:
        """Where it is sent; None for this host itself."""
        port = self.port(probe)
        if port:
            return port.space
        return self.cable.space if probe.kind is Kind.INBOUND else None

    def is_called_by(self, probe: Probe) -> bool:
        """Whether its destination is at the other end of the cable."""
        if probe.kind is Kind.VIRTUAL_NETWORK:
            return not probe.is_query
        return probe.kind is not Kind.INBOUND and probe.connection.interface == self.cable.name

    @property
    def networks(self) -> tuple[Behind, ...]:
        """The ports, for a plan."""
        return tuple(Behind(port.seat.bridge.name, port.seat.ends) for port in self.ports)

    def addresses(self) -> Iterator[Address]:
        """Those that nobody else has."""
        for ends in self.cable.ends.values():
            yield from (ends.near, ends.far)
        yield from (port.seat.ends.far for port in self.ports)
