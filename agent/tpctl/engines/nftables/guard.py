"""The guard of the data plane's own ports (g1): filter chains behind NAT. Pure.

What was redirected has been translated by then, whatever port it asked for, and is left alone. The original destination
port (`ct original proto-dst`) would not tell: an application's connection to port 15001 of another host has it as well.
So nothing that is aimed at the data plane may be translated before (`untranslated`).
"""

from __future__ import annotations

from collections.abc import Iterator

from tpctl.engines.nftables.parts import SYN, Parts, interface, join
from tpctl.engines.nftables.table import Chain, Hook, Rule
from tpctl.spec.guard import guarded_ports
from tpctl.spec.policy import Family, Protocol

FILTER = 0
GUARD, GUARD_OWN, GUARD_OUTPUT = "guard", "guard_own", "guard_output"
_AIMED = "g1: opened to the data plane's own ports"
_LOCAL = "fib daddr type local"


def base_chains(parts: Parts) -> Iterator[Chain]:
    """The chains that see what has arrived, and what leaves for this host."""
    loopback = interface(parts.policy.loopback)
    arrived = tuple(_aimed(parts, f"iifname != {loopback}", _LOCAL, GUARD))
    yield Chain("guard_input", arrived, Hook("filter", "input", FILTER))
    own = tuple(_aimed(parts, f"oifname {loopback}", "", GUARD_OWN))
    yield Chain(GUARD_OUTPUT, own, Hook("filter", "output", FILTER))


def called_chains(parts: Parts) -> Iterator[Chain]:
    """The chains that judge it."""
    if not _matches(parts):
        return
    health = "g1: the data plane's user may check its health"
    yield Chain(GUARD_OWN, (Rule(parts.owner, "return", health), Rule("", f"goto {GUARD}", _AIMED)))
    yield Chain(
        GUARD,
        (
            Rule("ct status dnat", "return", "g1: redirected, wherever it was going"),
            *parts.reset(_AIMED),
            Rule("", "reject", _AIMED),
        ),
    )


def untranslated(parts: Parts, families: tuple[Family, ...]) -> Iterator[Rule]:
    """The rule that ends a base chain for what is aimed at the data plane, so that no rule behind it redirects it."""
    ports = guarded_ports(parts.policy, Protocol.TCP)
    if ports and families:
        match = join(parts.guard(families), _port(parts, Protocol.TCP, ports), _LOCAL)
        yield Rule(match, "return", _AIMED)


def _aimed(parts: Parts, where: str, more: str, chain: str) -> Iterator[Rule]:
    for match in _matches(parts):
        yield Rule(join(parts.guard(), where, match, more), f"jump {chain}", _AIMED)


def _matches(parts: Parts) -> list[str]:
    """Matches for first packets to the ports, one a protocol. Nothing else tells the first one of a flow of UDP."""
    first = {Protocol.TCP: SYN, Protocol.UDP: "ct state new"}
    return [
        join(_port(parts, protocol, ports), first[protocol])
        for protocol in Protocol
        if parts.families and (ports := guarded_ports(parts.policy, protocol))
    ]


def _port(parts: Parts, protocol: Protocol, ports: tuple[int, ...]) -> str:
    return f"{protocol} dport {parts.one_or_set('guarded_ports', 'inet_service', ports)}"
