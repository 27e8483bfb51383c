"""A port of our own on a bridge, as a container or VM of a virtual network has one: what it sends, i2, v1 and v3 take.

Nothing of it reaches the others on the bridge: it knows the bridge's address without asking, joins no multicast group
(IFF_NOARP), and the bridge is told who has the port's address. Nor is the bridge changed: it takes the lowest address
of its ports, and the smallest MTU, unless it was given some, so the port's address is high and its MTU the bridge's.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from tpctl.arrival.cable import Ends
from tpctl.arrival.pair import (
    IFF_NOARP,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_LINKINFO,
    IFLA_MASTER,
    IFLA_MTU,
    IFLA_OPERSTATE,
    INFO_DATA,
    INFO_KIND,
    LINK,
    NDA_DST,
    NEIGHBOUR,
    OPERSTATE_UP,
    REACHABLE,
    RTM_GETLINK,
    Pair,
    add_address,
    add_default_route,
    add_neighbour,
    forget_neighbour,
    local_mac,
)
from tpctl.host import interfaces, routes
from tpctl.spec.policy import Address, Family, Policy, VirtualNetwork
from tpctl.system import netlink, text
from tpctl.system.errors import HostError, described
from tpctl.system.netlink import Netlink

_MOST = 4
"""Bridges of a virtual network: a host may have hundreds, which look the same to its rules."""
_RTM_GETNEIGH = 30
_BR_STP_STATE = 5
"""IFLA_BR_STP_STATE, linux/if_link.h."""
_SMALLEST = 16
"""Addresses of a network in which one can be taken that is nobody's."""
_TRIES = 16


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge of this host."""

    name: str
    index: int
    mac: bytes
    mtu: int
    has_spanning_tree: bool
    """Which keeps a new port closed for seconds."""
    is_attached: bool
    """Whether it has a port, and one of them is in use."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a port of ours can be: a bridge, this host's address on it, and one that nobody has."""

    network: VirtualNetwork
    bridge: Bridge
    ends: Ends

    @property
    def family(self) -> Family:
        """Of the addresses."""
        return Family.of(self.ends.near)


class BridgePort(Pair):
    """A port at a seat. Raises HostError when the kernel refuses, and says what."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        bridge = seat.bridge
        high, own = bytes([0xFE, 0xFF, 0xFF, *secrets.token_bytes(3)]), local_mac()
        mtu = {IFLA_MTU: bridge.mtu}
        super().__init__({IFLA_ADDRESS: high, IFLA_MASTER: bridge.index, **mtu}, {IFLA_ADDRESS: own, **mtu}, IFF_NOARP)
        try:
            add_address(self.far, self.far_index, seat.ends.far, seat.network.network.prefixlen)
            add_neighbour(self.far, self.far_index, seat.ends.near, bridge.mac)
            add_default_route(self.far, self.far_index, seat.ends.near)
            # One that is learnt anew after a while: somebody else may have the address later.
            add_neighbour(self.near, bridge.index, seat.ends.far, own, REACHABLE)
            self.await_carrier()
        except OSError as error:
            self.close()
            raise HostError(
                f"the kernel does not give a port of {bridge.name} its address: {error.strerror}"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove it; the bridge forgets it."""
        with contextlib.suppress(OSError), Netlink(netlink.ROUTE) as kernel:
            forget_neighbour(kernel, self.seat.bridge.index, self.seat.ends.far)
        super().close()


def ports(policy: Policy, stack: contextlib.ExitStack) -> tuple[list[BridgePort], list[str]]:
    """A port for each virtual network of a policy, as far as there can be one, and why there is none for others.

    They are closed with the stack.
    """
    made: list[BridgePort] = []
    missing: list[str] = []
    for family in sorted(policy.families):
        for network in policy.networks(family):
            try:
                found = [*seats(network)]
                made += [stack.enter_context(BridgePort(seat)) for seat in found]
            except (HostError, OSError) as error:
                missing.append(f"virtual network {network}: {described(error)}; `tpctl verify` rehearses it")
    return made, missing


def seats(network: VirtualNetwork) -> Iterator[Seat]:
    """Where its containers may be. Raises HostError when there is no such place, and says why; OSError."""
    carried = [name for name in interfaces.names() if network.carries(name)]
    if not carried:
        raise HostError(f"this host has no interface {network.interface}")
    with Netlink(netlink.ROUTE) as kernel:
        bridges = [bridge for bridge in _bridges(kernel) if bridge.name in carried]
        if not bridges:
            raise HostError(f"{carried[0]} is no bridge, so that only what is behind it can send what it redirects")
        refusals = {bridge.name: _refusal(bridge, network) for bridge in bridges}
        fit = [bridge for bridge in bridges if refusals[bridge.name] is None]
        if not fit:
            raise HostError("; ".join(f"{name} {why}" for name, why in refusals.items()))
        for bridge in fit[:_MOST]:
            yield Seat(network, bridge, _ends(kernel, bridge, network))


def _refusal(bridge: Bridge, network: VirtualNetwork) -> str | None:
    if not bridge.is_attached:
        return "has nothing attached to it now"
    if bridge.has_spanning_tree:
        return "has a spanning tree (STP), which keeps a new port closed for seconds"
    if _own_address(bridge, network) is None:
        return f"has no address of {network.network}"
    if network.network.num_addresses < _SMALLEST:
        return f"has too few addresses in {network.network} to take one that is nobody's"
    return None


def _own_address(bridge: Bridge, network: VirtualNetwork) -> Address | None:
    mine = (one.address for one in interfaces.addresses() if one.interface == bridge.name)
    return next((one for one in mine if one.version == network.network.version and one in network.network), None)


def _ends(kernel: Netlink, bridge: Bridge, network: VirtualNetwork) -> Ends:
    """This host's address, and one of the upper half of the network, which is given out last."""
    near = _own_address(bridge, network)
    assert near is not None
    known = {*_neighbours(kernel, bridge.index), near, network.network.broadcast_address}
    half = network.network.num_addresses // 2
    for _ in range(_TRIES):
        far: Address = ip_address(int(network.network.network_address) + half + secrets.randbelow(half))
        if far not in known and not routes.is_local(far):
            return Ends(near, far)
    raise HostError(f"{bridge.name} knows somebody at every address of {network.network} that was tried")


def _bridges(kernel: Netlink) -> list[Bridge]:
    links = [
        (LINK.unpack_from(message)[2], netlink.parse(message[LINK.size :]))
        for message in kernel.ask(RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0), netlink.DUMP)
    ]
    used = {
        int.from_bytes(held[IFLA_MASTER], sys.byteorder)
        for _, held in links
        if IFLA_MASTER in held and held.get(IFLA_OPERSTATE) == OPERSTATE_UP
    }
    return [_bridge(index, held, info, used) for index, held in links if (info := _info(held)) is not None]


def _info(held: netlink.Attributes) -> netlink.Attributes | None:
    """What the kernel says of a bridge; None of another device."""
    info = netlink.parse(held.get(IFLA_LINKINFO, b""))
    kind = info.get(INFO_KIND, b"").rstrip(b"\0")
    return netlink.parse(info.get(INFO_DATA, b"")) if kind == b"bridge" else None


def _bridge(index: int, held: netlink.Attributes, info: Mapping[int, bytes], used: set[int]) -> Bridge:
    return Bridge(
        text.decoded(held[IFLA_IFNAME].rstrip(b"\0")),
        index,
        held[IFLA_ADDRESS],
        int.from_bytes(held[IFLA_MTU], sys.byteorder),
        any(info.get(_BR_STP_STATE, b"")),
        index in used and held.get(IFLA_OPERSTATE) == OPERSTATE_UP,
    )


def _neighbours(kernel: Netlink, index: int) -> Iterator[Address]:
    for message in kernel.ask(_RTM_GETNEIGH, NEIGHBOUR.pack(0, 0, 0, 0, 0), netlink.DUMP):
        packed = netlink.parse(message[NEIGHBOUR.size :]).get(NDA_DST, b"")
        if NEIGHBOUR.unpack_from(message)[1] == index and len(packed) in (4, 16):
            yield ip_address(packed)
