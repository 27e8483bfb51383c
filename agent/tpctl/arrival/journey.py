"""The packets by which a connection arrives: what they look like at each hook, with and without a redirect. Pure.

A redirected connection of this host's own takes a way that filters seldom expect:

- At the hook output its destination is a loopback address from priority -100 on, and the interface is still the one it
  would have left by: nf_hook_state keeps it (nf_nat_ipv4_local_fn() in net/netfilter/nf_nat_proto.c).
- It crosses lo, with this host's own address as source; a DNS query gets a loopback address as source, too.
- Its answers cross lo, too, and when they arrive their source is the destination that was asked for: NAT has put it
  back in postrouting.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpctl.arrival.packets import LOOPBACK, Packet
from tpctl.engines.foreign import Hook
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.policy import RESERVED, Address, Family, Redirection
from tpctl.spec.verdict import Action, Verdict

NAT = -100
"""NF_IP_PRI_NAT_DST: a destination is translated around it (linux/netfilter_ipv4.h)."""
_SOURCE_NAT = 100
_FIRST, _LAST = -(1 << 31), (1 << 31) - 1
_NEW, _ESTABLISHED = frozenset({"new"}), frozenset({"established"})


class Way(enum.StrEnum):
    """How an engine brings a connection to the data plane."""

    NAT = "nat"
    TPROXY = "tproxy"
    SOCKETS = "sockets"
    """eBPF: the socket itself is led elsewhere, and packets are translated by nobody."""


@dataclass(frozen=True, slots=True)
class Trip:
    """A connection, or all of a kind: what is None or empty differs between them."""

    direction: Direction
    family: Family
    protocol: str
    interface: str | None
    """The one it arrives or would leave by."""
    port: int | None = None
    """The destination's port, as it was asked for."""
    sources: tuple[Address, ...] = ()
    destinations: tuple[Address, ...] = ()
    source_port: int | None = None
    uid: int | None = None
    proxy_uid: int | None = None
    redirected_to: int | None = None
    """The data plane's port; None where nothing is redirected."""
    way: Way = Way.NAT
    is_forwarded: bool = False
    """Inbound: without a redirect it would be forwarded, as from a virtual network."""
    mark: int = 0


def of_connection(connection: Connection, verdict: Verdict, engine: str, proxy_uid: int) -> Trip:
    """That of one connection, as `decide()` judges it."""
    redirected = verdict.action is Action.REDIRECT
    sockets = engine == "ebpf"
    transparent = verdict.how is Redirection.TPROXY
    return Trip(
        connection.direction,
        connection.family,
        connection.protocol,
        connection.interface,
        connection.destination_port,
        () if connection.source.is_unspecified else (connection.source,),
        (connection.destination,),
        connection.source_port,
        connection.uid,
        proxy_uid,
        verdict.port if redirected else None,
        Way.SOCKETS if sockets else Way.TPROXY if transparent else Way.NAT,
        connection.direction is Direction.INBOUND and not connection.local_destination,
        connection.mark,
    )


def packets(trip: Trip) -> tuple[Packet, ...]:
    """What has to get through, in order."""
    outbound = trip.direction is Direction.OUTBOUND
    if trip.redirected_to is None or (not outbound and trip.way is not Way.NAT):
        return tuple(_untouched(trip))
    if outbound:
        return tuple(_led_away(trip) if trip.way is Way.SOCKETS else _turned_back(trip))
    return tuple(_taken_in(trip))


def counterparts(trip: Trip) -> dict[tuple[Hook, bool], Packet]:
    """Without the redirect: by hook and whether it is an answer, what filters would see; nothing where it never was."""
    return {(packet.hook, packet.is_reply): packet for packet in _untouched(trip)}


def _first(trip: Trip, what: str, hook: Hook) -> Packet:
    outbound = trip.direction is Direction.OUTBOUND
    stays = trip.interface == LOOPBACK or not (outbound or trip.is_forwarded)
    return Packet(
        what, hook, trip.family, trip.protocol,
        in_interface="" if outbound else trip.interface,
        out_interface=trip.interface if outbound else "",
        sources=trip.sources, destinations=trip.destinations,
        source_is_local=outbound, destination_is_local=stays,
        source_port=trip.source_port, destination_port=trip.port,
        states=_NEW, uid=trip.uid, has_owner=outbound, mark=trip.mark,
        original_destinations=trip.destinations, original_port=trip.port,
    )  # fmt: skip


def _answer(packet: Packet, what: str, hook: Hook, proxy_uid: int | None) -> Packet:
    """What comes back, as it is sent: with the ends of `packet` exchanged."""
    return dataclasses.replace(
        packet, what=what, hook=hook, is_reply=True, states=_ESTABLISHED, mark=0,
        in_interface=packet.out_interface if hook in (Hook.PREROUTING, Hook.INPUT) else "",
        out_interface=(packet.in_interface or packet.out_interface) if hook in (Hook.OUTPUT, Hook.POSTROUTING) else "",
        sources=packet.destinations, destinations=packet.sources,
        source_is_local=packet.destination_is_local, destination_is_local=packet.source_is_local,
        source_port=packet.destination_port, destination_port=packet.source_port,
        uid=proxy_uid, has_owner=hook in (Hook.OUTPUT, Hook.POSTROUTING), priorities=(_FIRST, _LAST),
    )  # fmt: skip


def _at(packet: Packet, hook: Hook, first: int = _FIRST, last: int = _LAST, **changes: Any) -> Packet:
    return dataclasses.replace(packet, hook=hook, priorities=(first, last), **changes)


def _untouched(trip: Trip) -> Iterator[Packet]:
    """A connection that nobody redirects."""
    first = _first(trip, "the connection", Hook.PREROUTING)
    answer = "an answer"
    if trip.direction is Direction.OUTBOUND:
        yield _at(first, Hook.OUTPUT)
        yield _at(first, Hook.POSTROUTING)
        if trip.interface == LOOPBACK:
            inside: dict[str, Any] = {"in_interface": LOOPBACK, "out_interface": "", "has_owner": False}
            yield _at(first, Hook.PREROUTING, **inside)
            yield _at(first, Hook.INPUT, **inside)
            yield _answer(first, answer, Hook.OUTPUT, None)
            yield _answer(first, answer, Hook.POSTROUTING, None)
        yield _answer(first, answer, Hook.PREROUTING, None)
        yield _answer(first, answer, Hook.INPUT, None)
        return
    yield first
    if trip.is_forwarded:
        return
    yield _at(first, Hook.INPUT)
    yield _answer(first, answer, Hook.OUTPUT, None)
    yield _answer(first, answer, Hook.POSTROUTING, None)


def _turned_back(trip: Trip) -> Iterator[Packet]:
    """An own connection that NAT leads over lo."""
    first = _first(trip, "the connection, before it is redirected", Hook.OUTPUT)
    loopback = RESERVED[trip.family].local.network_address
    yield _at(first, Hook.OUTPUT, last=NAT)
    there = dataclasses.replace(
        first, what="the redirected connection", destinations=(loopback,), destination_is_local=True,
        destination_port=trip.redirected_to, is_translated=True,
    )  # fmt: skip
    yield _at(there, Hook.OUTPUT, NAT + 1)
    yield from _over_loopback(trip, there, is_put_back=True)


def _led_away(trip: Trip) -> Iterator[Packet]:
    """An own connection whose socket the eBPF engine has led to the data plane."""
    loopback = RESERVED[trip.family].local.network_address
    first = dataclasses.replace(
        _first(trip, "the redirected connection", Hook.OUTPUT), out_interface=LOOPBACK, sources=(loopback,),
        destinations=(loopback,), source_is_local=True, destination_is_local=True,
        destination_port=trip.redirected_to, original_destinations=(loopback,), original_port=trip.redirected_to,
    )  # fmt: skip
    yield first
    yield from _over_loopback(trip, first, is_put_back=False)


def _over_loopback(trip: Trip, first: Packet, *, is_put_back: bool) -> Iterator[Packet]:
    there = dataclasses.replace(first, out_interface=LOOPBACK)
    # A DNS query gets another source as well (d5).
    other = is_put_back and trip.protocol == "udp"
    seen = dataclasses.replace(there, sources=there.destinations) if other else there
    arriving = dataclasses.replace(seen, in_interface=LOOPBACK, out_interface="", has_owner=False)
    yield _at(there, Hook.POSTROUTING, last=_SOURCE_NAT - 1)
    yield _at(seen, Hook.POSTROUTING, _SOURCE_NAT)
    yield _at(arriving, Hook.PREROUTING)
    yield _at(arriving, Hook.INPUT)
    what = "an answer of the data plane"
    yield _at(_answer(seen, what, Hook.OUTPUT, trip.proxy_uid), Hook.OUTPUT, last=NAT)
    yield _at(_answer(there, what, Hook.OUTPUT, trip.proxy_uid), Hook.OUTPUT, NAT + 1)
    back: dict[str, Any] = {
        "sources": trip.destinations,
        "source_port": trip.port,
        "source_is_local": trip.interface == LOOPBACK,
    }
    back = back if is_put_back else {}
    yield _at(_answer(there, what, Hook.POSTROUTING, trip.proxy_uid), Hook.POSTROUTING, last=_SOURCE_NAT)
    yield _at(_answer(there, what, Hook.POSTROUTING, trip.proxy_uid), Hook.POSTROUTING, _SOURCE_NAT + 1, **back)
    yield _at(_answer(there, what, Hook.PREROUTING, None), Hook.PREROUTING, **back)
    yield _at(_answer(there, what, Hook.INPUT, None), Hook.INPUT, **back)


def _taken_in(trip: Trip) -> Iterator[Packet]:
    """A connection from outside that NAT leads to the data plane."""
    first = _first(trip, "the connection, before it is redirected", Hook.PREROUTING)
    yield _at(first, Hook.PREROUTING, last=NAT)
    inside = dataclasses.replace(
        first, what="the redirected connection", destination_is_local=True, destination_port=trip.redirected_to,
        is_translated=True, destinations=() if trip.is_forwarded else trip.destinations,
    )  # fmt: skip
    yield _at(inside, Hook.PREROUTING, NAT + 1)
    yield _at(inside, Hook.INPUT)
    what = "an answer of the data plane"
    back: dict[str, Any] = {"sources": trip.destinations, "source_port": trip.port}
    yield _answer(inside, what, Hook.OUTPUT, trip.proxy_uid)
    yield _at(_answer(inside, what, Hook.POSTROUTING, trip.proxy_uid), Hook.POSTROUTING, last=_SOURCE_NAT)
    yield _at(_answer(inside, what, Hook.POSTROUTING, trip.proxy_uid), Hook.POSTROUTING, _SOURCE_NAT + 1, **back)
