"""A connection as the kernel's hooks see it: what `decide()` is asked about."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tpctl.spec.policy import Address, Family


class Direction(enum.StrEnum):
    """Which hook sees the connection first."""

    INBOUND = "inbound"
    """It arrives on an interface, for this host or to be forwarded (PREROUTING)."""
    OUTBOUND = "outbound"
    """A process on this host opens it (OUTPUT)."""


class State(enum.StrEnum):
    """The packet's conntrack state."""

    NEW = "new"
    """The first packet: a TCP SYN, or the first datagram of a flow."""
    MIDSTREAM = "midstream"
    """A TCP segment other than a SYN, of a connection conntrack has not seen (it was opened before the install)."""
    ESTABLISHED = "established"
    """It belongs to a connection that was decided before."""
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection (or the first datagram of a flow) as the kernel's hooks see it."""

    direction: Direction
    protocol: str
    """"tcp", "udp", or any other IP protocol's name."""
    source: Address
    destination: Address
    destination_port: int | None
    interface: str
    """The interface by which it arrives (inbound) or leaves (outbound)."""
    source_port: int | None = None
    uid: int | None = None
    """The fsuid of the process that created the socket; None when there is none (forwarded, sent by the kernel)."""
    cgroup: str | None = None
    """The control group in which the socket was created, from the root of the hierarchy and without a leading slash."""
    mark: int = 0
    """Outbound only: the mark of the socket (SO_MARK, socket(7)); 0 when it has none."""
    device: str | None = None
    """Outbound only: the interface that the socket is bound to (SO_BINDTODEVICE, socket(7)), if any."""
    device_leads_to_loopback: bool = True
    """Whether packets from a socket bound to `device` can reach the loopback addresses."""
    local_destination: bool = True
    """Inbound only: whether the destination is an address of this host."""
    local_source: bool = True
    """Outbound only: whether the source is an address of this host. It is not if the data plane dials the
    application from the client's own address (IP_TRANSPARENT)."""
    state: State = State.NEW
    data_plane_listens: bool = True
    """Whether anything listens on the port the connection would be redirected to."""

    @property
    def family(self) -> Family:
        """The IP family of the connection."""
        return Family.of(self.destination)

    def is_bound(self, loopback: str) -> bool:
        """Whether the socket is bound to an interface other than the loopback interface of that name."""
        return self.direction is Direction.OUTBOUND and self.device not in (None, loopback)
