"""Packets as filters see them, and what a rule asks of one. Pure.

A packet may stand for many: what is None is not known, or differs between them. So a rule may match some of them.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address, ip_network, summarize_address_range

from tpctl.engines.foreign import Condition, Hook
from tpctl.spec.policy import Address, Family, Network, PortRange


class Matching(enum.IntEnum):
    """How many of the packets a rule matches."""

    NEVER = 0
    PERHAPS = 1
    """The rule asks for something that nobody here can tell: a set, a limit, an extension."""
    SOME = 2
    ALL = 3


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet at one hook, or all packets of a kind."""

    what: str
    """In words, such as "the redirected connection"."""
    hook: Hook
    family: Family
    protocol: str
    is_reply: bool = False
    in_interface: str | None = None
    """The interface by which it came; "" at the hook output, where there is none. None: any but lo."""
    out_interface: str | None = None
    """The interface by which it leaves; "" where that is not known yet. None: any but lo."""
    sources: tuple[Address, ...] = ()
    """Where it may come from; nothing means anywhere."""
    destinations: tuple[Address, ...] = ()
    source_is_local: bool | None = None
    """Whether the kernel takes it for an address of this host (`fib saddr type local`, addrtype)."""
    destination_is_local: bool | None = None
    source_port: int | None = None
    destination_port: int | None = None
    states: frozenset[str] = frozenset({"new"})
    """What conntrack says, in nft's words; nothing before conntrack has seen it."""
    uid: int | None = None
    has_owner: bool = False
    """Whether there is a socket that rules can ask for the owner of: only where this host sends it."""
    mark: int | None = 0
    original_destinations: tuple[Address, ...] = ()
    original_port: int | None = None
    """What conntrack remembers of the first packet, before any translation (`ct original`)."""
    is_translated: bool = False
    priorities: tuple[int, int] = (-(1 << 31), (1 << 31) - 1)
    """The base chains that see it like this: from the first priority to the last."""


LOOPBACK = "lo"
_FIRST_FREE_PORT = 1024
"""Clients whose port nobody knows have one that the kernel chose (ip(7), ip_local_port_range)."""


def match_one(condition: Condition, packet: Packet) -> Matching:
    """How many of the packets meet a condition."""
    asked = _ASKED.get(condition.field)
    found = asked(packet, condition.values) if asked else Matching.PERHAPS
    return _opposite(found) if condition.negated else found


def match(conditions: Iterable[Condition], packet: Packet) -> Matching:
    """How many of the packets meet them all; SOME is a guess where several of them hold for some."""
    return min((match_one(condition, packet) for condition in conditions), default=Matching.ALL)


def _opposite(found: Matching) -> Matching:
    return {Matching.ALL: Matching.NEVER, Matching.NEVER: Matching.ALL}.get(found, found)


def _yes(true: bool) -> Matching:
    return Matching.ALL if true else Matching.NEVER


def _any(found: Iterable[Matching]) -> Matching:
    return max(found, default=Matching.NEVER)


def _interface(name: str | None, values: tuple[str, ...]) -> Matching:
    if name is None:
        named = [value for value in values if value != LOOPBACK]
        return _yes(any(value in ("*", "+") for value in named)) or (Matching.SOME if named else Matching.NEVER)
    return _yes(any(fnmatch.fnmatchcase(name, _pattern(value)) for value in values) and bool(name))


def _pattern(value: str) -> str:
    """An interface's name as iptables ("eth+") and nft ("eth*") write that any ending will do."""
    wild = value.endswith(("+", "*"))
    stem = value.removesuffix("+").removesuffix("*") if wild else value
    return "".join(f"[{char}]" if char in "*?[" else char for char in stem) + ("*" if wild else "")


def _addresses(addresses: tuple[Address, ...], is_local: bool | None, values: tuple[str, ...]) -> Matching:
    if not addresses:
        return _any(_anywhere(is_local, value) for value in values)
    found = [_any(_is_in(address, value) for value in values) for address in addresses]
    if min(found) is max(found):
        return found[0]
    return Matching.SOME if max(found) is Matching.ALL else Matching.PERHAPS


def _is_in(address: Address, value: str) -> Matching:
    networks = networks_of(value)
    if networks is None:
        return Matching.PERHAPS
    return _yes(any(network.version == address.version and address in network for network in networks))


def _anywhere(is_local: bool | None, value: str) -> Matching:
    networks = networks_of(value)
    if networks is None:
        return Matching.PERHAPS
    if any(network.prefixlen == 0 for network in networks):
        return Matching.ALL
    if is_local is False and all(network.is_loopback for network in networks):
        return Matching.NEVER
    return Matching.SOME


@lru_cache(maxsize=1 << 16)
def networks_of(value: str) -> tuple[Network, ...] | None:
    """`10.0.0.0/8`, `10.0.0.1`, `10.0.0.1-10.0.0.9`, `10.0.0.0/255.0.0.0`; None for anything else."""
    first, _, last = value.partition("-")
    try:
        if last:
            return tuple(summarize_address_range(ip_address(first), ip_address(last)))
        return (ip_network(value, strict=False),)
    except (ValueError, TypeError):
        return None


def _port(port: int | None, values: tuple[str, ...], *, is_client: bool) -> Matching:
    ranges = [ports_of(value) for value in values]
    if any(found is None for found in ranges):
        return Matching.PERHAPS
    known = [found for found in ranges if found is not None]
    if port is None and is_client and all(found.last < _FIRST_FREE_PORT for found in known):
        return Matching.NEVER
    if port is None:
        return Matching.ALL if any(found.first <= 1 and found.last >= 65535 for found in known) else Matching.SOME
    return _yes(any(port in found for found in known))


def ports_of(value: str) -> PortRange | None:
    """`80`, `80-90` (nft) or `80:90` (iptables); None for anything else, such as the name of a set."""
    first, _, last = value.replace(":", "-").partition("-")
    if not first.isdecimal() or not (last.isdecimal() or not last):
        return None
    try:
        return PortRange(max(int(first), 1), int(last or first))
    except ValueError:
        return None


def _states(packet: Packet, values: tuple[str, ...]) -> Matching:
    if any(value.startswith("@") for value in values):
        return Matching.PERHAPS
    return _yes(bool(packet.states & {value.lower() for value in values}))


def _mark(packet: Packet, values: tuple[str, ...]) -> Matching:
    return _any(_marked(packet.mark, value) for value in values)


def _marked(mark: int | None, value: str) -> Matching:
    try:
        wanted, _, mask = (word for word in value.partition("/"))
        if mark is None:
            return Matching.PERHAPS
        return _yes(mark & (int(mask, 0) if mask else 0xFFFFFFFF) == int(wanted, 0))
    except ValueError:
        return Matching.PERHAPS


def _uid(packet: Packet, values: tuple[str, ...]) -> Matching:
    if not packet.has_owner:
        return Matching.NEVER
    bounds = [value.split("-") for value in values]
    if any(not number.isdecimal() for bound in bounds for number in bound):
        return Matching.PERHAPS
    if packet.uid is None:
        return Matching.SOME
    return _yes(any(int(bound[0]) <= packet.uid <= int(bound[-1]) for bound in bounds))


def _type(is_local: bool | None, values: tuple[str, ...]) -> Matching:
    if is_local is None:
        return Matching.SOME
    return _yes(
        any((value.lower() == "local") == is_local for value in values if value.lower() in ("local", "unicast"))
    )


def _protocol(packet: Packet, values: tuple[str, ...]) -> Matching:
    numbers = {"6": "tcp", "17": "udp"}
    return _yes(any(numbers.get(value, value).lower() in (packet.protocol, "all", "0") for value in values))


_ASKED: dict[str, Callable[[Packet, tuple[str, ...]], Matching]] = {
    "in_interface": lambda packet, values: _interface(packet.in_interface, values),
    "out_interface": lambda packet, values: _interface(packet.out_interface, values),
    "source": lambda packet, values: _addresses(packet.sources, packet.source_is_local, values),
    "destination": lambda packet, values: _addresses(packet.destinations, packet.destination_is_local, values),
    "source_type": lambda packet, values: _type(packet.source_is_local, values),
    "destination_type": lambda packet, values: _type(packet.destination_is_local, values),
    "protocol": _protocol,
    "family": lambda packet, values: _yes(f"ipv{packet.family}" in values),
    "source_port": lambda packet, values: _port(packet.source_port, values, is_client=not packet.is_reply),
    "destination_port": lambda packet, values: _port(packet.destination_port, values, is_client=packet.is_reply),
    "port": lambda packet, values: _any(
        _port(port, values, is_client=is_source is not packet.is_reply)
        for port, is_source in ((packet.source_port, True), (packet.destination_port, False))
    ),
    "state": _states,
    "status": lambda packet, values: _yes(packet.is_translated and "dnat" in {value.lower() for value in values}),
    "original_port": lambda packet, values: _port(packet.original_port, values, is_client=False),
    "original_destination": lambda packet, values: _addresses(packet.original_destinations, None, values),
    "state_or_status": lambda packet, values: max(
        _states(packet, values), _yes(packet.is_translated and "dnat" in {value.lower() for value in values})
    ),
    "direction": lambda packet, values: _yes(packet.is_reply == (values[0].lower() == "reply")),
    "mark": _mark,
    "uid": _uid,
    "owner": lambda packet, _: _yes(packet.has_owner),
    "syn": lambda packet, _: _yes(packet.protocol == "tcp" and not packet.is_reply),
    "never": lambda *_: Matching.NEVER,
}
"""By a condition's field, how its values are compared. `never` is what only other packets can meet."""
