"""The sockets at which probes end: the destination that they ask for, and a stand-in where no data plane listens.

All close with a reset (SO_LINGER, socket(7)), also when this process is killed: nothing waits for an answer then, and
no port stays in TIME_WAIT.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from tpctl.arrival.cable import Ends
from tpctl.arrival.model import Kind, Probe
from tpctl.arrival.outside import Outside
from tpctl.arrival.plan import inbound_ports, is_excluded_port
from tpctl.host.sockets import Listener, listeners
from tpctl.rehearsal import sockets
from tpctl.rehearsal.choices import data_plane_ports
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.connection import Direction
from tpctl.spec.policy import DNS_PORT, RESERVED, Address, Family, Policy, Protocol

_WILDCARD: dict[Family, Address] = {Family.IPV4: IPv4Address(0), Family.IPV6: IPv6Address(0)}
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger (socket(7))."""
_BACKLOG = 64
_TRIES = 20
_SO_ATTACH_FILTER = 26
_ACCEPT, _DROP = 0xFFFF, 0
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
"""BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K (linux/bpf_common.h)."""
_NETWORK_HEADER = 0xFFF00000
"""SKF_NET_OFF (linux/filter.h): behind it is the IP header, wherever the socket's data begins."""


@dataclass(slots=True)
class Place:
    """An open socket, and what arriving there means."""

    socket: socket.socket
    family: Family
    probes: tuple[Probe, ...] = ()
    """Those that it is the destination of; empty for a stand-in."""

    @property
    def is_stand_in(self) -> bool:
        """Whether it stands where the data plane should listen."""
        return not self.probes

    def stands_for(self, protocol: Protocol, port: int, family: Family) -> bool:
        """Whether it stands where connections to that port should end."""
        if not self.is_stand_in or self.family is not family:
            return False
        kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
        return self.socket.type is kind and bool(self.socket.getsockname()[1] == port)


@dataclass(slots=True)
class Ports:
    """Ports on this host that probes of the inbound side ask for, with the sockets that listen there."""

    numbers: tuple[int, ...]
    held: dict[tuple[Family, int], list[socket.socket]] = field(default_factory=dict)


def new_socket(protocol: Protocol, family: Family) -> socket.socket:
    """A socket that closes with a reset. Of the current namespace and user."""
    made = sockets.new_socket(protocol, family)
    if protocol is Protocol.TCP:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    return made


def opened(protocol: Protocol, address: Address, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError."""
    made = new_socket(protocol, Family.of(address))
    try:
        _share_with_the_past(made, protocol)
        made.bind((str(address), port))
        if protocol is Protocol.TCP:
            made.listen(_BACKLOG)
    except OSError:
        made.close()
        raise
    return made


def _share_with_the_past(made: socket.socket, protocol: Protocol) -> None:
    """Let a socket have a port that connections of a server that is gone still hold (TIME-WAIT, tcp(7))."""
    if protocol is Protocol.TCP:  # for UDP, the option means that others may take what comes
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def reserve_ports(policy: Policy, ends: Iterable[tuple[Family, Ends]], wanted: int) -> Ports:
    """Ports that are redirected where connections arrive, and that nobody listens on, if there are any."""
    found = Ports(())
    pairs = tuple(ends)
    included = policy.inbound.include_ports
    candidates = inbound_ports(policy) if included else itertools.repeat(0, _TRIES)
    for number in candidates:
        if len(found.numbers) == wanted:
            break
        with contextlib.suppress(OSError):
            _reserve(policy, pairs, number, found)
    if not found.numbers and included:
        found.numbers = tuple(itertools.islice(inbound_ports(policy), 1))
    return found


def _reserve(policy: Policy, ends: tuple[tuple[Family, Ends], ...], number: int, found: Ports) -> None:
    """Listen on a port (0: any) on the addresses that a data plane may call for an inbound connection."""
    with contextlib.ExitStack() as undo:
        held = {}
        for family, pair in ends:
            made = []
            for address in (pair.near, RESERVED[family].local.network_address):
                made.append(undo.enter_context(opened(Protocol.TCP, address, number)))
                number = int(made[-1].getsockname()[1])
            held[family, number] = made
        if not is_excluded_port(policy, number) and number not in data_plane_ports(policy) | {DNS_PORT}:
            found.held |= held
            found.numbers += (number,)
            undo.pop_all()


def destinations(probes: Iterable[Probe], outside: Outside, ports: Ports) -> Iterator[Place]:
    """The destinations that probes ask for, as far as they are ours: in the scratch namespace, or on this host."""
    here: dict[socket.socket, list[Probe]] = {}
    for probe in probes:
        to, port = probe.connection.destination, probe.connection.destination_port
        assert port is not None
        if probe.kind in (Kind.INBOUND, Kind.SELF_CALL):
            for made in ports.held.get((probe.family, port), ()):
                here.setdefault(made, []).append(probe)  # where one port is redirected, both kinds ask for it
        elif outside.is_called_by(probe):
            with outside.cable.space.inside():
                yield Place(opened(Protocol(probe.connection.protocol), to, port), probe.family, (probe,))
    for made, askers in here.items():
        yield Place(made, askers[0].family, tuple(askers))


class Audience:
    """Who listens on the data plane's ports of this host."""

    def __init__(self) -> None:
        self._found = {protocol: listeners(protocol) for protocol in Protocol}

    def at(self, protocol: Protocol, port: int, family: Family) -> tuple[Listener, ...]:
        """The sockets that have the port in a family."""
        found = (one for one in self._found[protocol] if one.port == port)
        return tuple(one for one in found if _serves(one, family))

    def applications(self, policy: Policy, family: Family) -> Iterator[int]:
        """Ports on which others listen for whoever comes from elsewhere, if arriving connections are redirected."""
        seen = set(data_plane_ports(policy))
        for one in self._found[Protocol.TCP]:
            if one.port not in seen and not one.address.is_loopback and _serves(one, family):
                seen.add(one.port)
                if not is_excluded_port(policy, one.port):
                    yield one.port


def _serves(listener: Listener, family: Family) -> bool:
    address = listener.address
    if address.version == 6 and (address.is_unspecified or getattr(address, "ipv4_mapped", None)):
        return True
    return address.version == family


def stand_ins(
    policy: Policy, probes: Iterable[Probe], outside: Outside, audience: Audience, *, everywhere: bool
) -> Iterator[Place]:
    """Sockets of the data plane's user where nobody listens whom a probe is redirected to.

    They are bound to the very address that the probe is redirected to, or `everywhere` for an engine that chooses no
    other sockets, and take what the probes' addresses send: what others send is dropped, so that it is refused as
    before when the kernel sends it again (but for queries of others, which are answered with an error). A data plane
    that starts meanwhile can share the port (SO_REUSEPORT), if it does that and has the same user.
    """
    taken = set()
    for probe in probes:
        protocol, port = Protocol(probe.connection.protocol), probe.expected.port
        assert port is not None
        arrives = probe.connection.direction is Direction.INBOUND
        ends = outside.ends(probe)
        address = ends.near if arrives else RESERVED[probe.family].local.network_address
        if everywhere and protocol is Protocol.TCP:
            address = _WILDCARD[probe.family]
        key = (protocol, port, address)
        if key in taken or audience.at(protocol, port, probe.family):
            continue
        taken.add(key)
        with contextlib.suppress(OSError):
            # Redirected queries come from the local address (rule d5), as everybody's do.
            sources = (ends.near, ends.far, *((address,) if probe.kind is Kind.DNS else ()))
            yield Place(_stand_in(policy.proxy_uid, protocol, address, port, sources), probe.family)


def _stand_in(uid: int, protocol: Protocol, address: Address, port: int, sources: tuple[Address, ...]) -> socket.socket:
    family = Family.of(address)
    host = Namespace.current()
    try:
        with host.inside(uid):
            made = new_socket(protocol, family)
        try:
            _take_only(made, family, sources)  # as root: for TCP, Linux 6.18 asks for a capability
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _share_with_the_past(made, protocol)
            with host.inside(uid):
                made.bind((str(address), port))
                if protocol is Protocol.TCP:
                    made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
    finally:
        host.close()
    return made


def transparent(place: Place) -> None:
    """Let a stand-in take what TPROXY hands over. As root."""
    with contextlib.suppress(OSError):
        sockets.make_transparent(place.socket, place.family)


def _take_only(made: socket.socket, family: Family, sources: tuple[Address, ...]) -> None:
    """Attach a filter (SO_ATTACH_FILTER, socket(7)) that drops what comes from other addresses."""
    offset, words = (12, 1) if family is Family.IPV4 else (8, 4)
    program: list[tuple[int, int, int, int]] = []
    for source in sources:
        for word in range(words):
            value = int.from_bytes(source.packed[4 * word : 4 * word + 4], "big")
            to_next_source = 2 * (words - word - 1) + 1
            program.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset + 4 * word))
            program.append((_JUMP_IF_EQUAL, 0, to_next_source, value))
        program.append((_RETURN, 0, 0, _ACCEPT))
    program.append((_RETURN, 0, 0, _DROP))
    held = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(held)))
