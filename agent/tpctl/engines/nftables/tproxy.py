"""What `--inbound-mode tproxy` adds: handing over what arrives, and finding the answers of applications. Pure.

An application's answer to a client whose address the data plane has dialled from would leave the host. It is given a
mark, by which `tpctl.change.routing` brings it back. The connection is known by its conntrack mark, not by a mark of
the data plane's socket, so that every data plane that dials from its clients' addresses is served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tpctl.engines.base import ARRIVED_MARK, DIALLED_MARK, ROUTE_MARK, SIGNATURE
from tpctl.engines.nftables.parts import ADDRESS, SYN, TCP, Parts, arrives_at, interface, join
from tpctl.engines.nftables.table import Chain, Hook, Rule
from tpctl.spec.policy import DNS_PORT

MANGLE = -150
FIRST, BEFORE_NAT, BEHIND_NAT = -102, -99, -97
"""On either side of the nat chains of `ruleset`, whose priorities are -101 and -98. Others have their NAT at -100."""

INBOUND, HAND_OVER, ANSWERS = "tproxy_inbound", "tproxy_listener", "answers"
_ARRIVED = f"ct mark & {ARRIVED_MARK:#x} == {ARRIVED_MARK:#x}"
_DIALLED = f"ct mark & {DIALLED_MARK:#x} == {DIALLED_MARK:#x}"


def prerouting_chains(parts: Parts) -> Iterator[Chain]:
    """The base chains that see what arrives; nothing but empty ones when the policy does without.

    Each is asked before and behind the nat chain that would redirect: a packet that is on its way while one mode
    replaces the other meets one of them either with its old or with its new rules.
    """
    if not parts.policy.inbound.is_transparent or not parts.families:
        return
    running = Rule(join(parts.guard(), TCP, "ct direction original", _ARRIVED), f"jump {HAND_OVER}", _RUNNING)
    away = f"iifname != {interface(parts.policy.loopback)}"
    local = join(parts.guard(), away, SYN, "fib daddr type local")
    arriving = Rule(local, f"jump {INBOUND}", f"i0: new connections to this host {SIGNATURE}")
    insert = parts.policy.inbound.insert
    outside = (*parts.from_outside(), *parts.excluded_arrivals())
    yield Chain(
        "tproxy_first", (running, *outside, arriving), Hook("filter", "prerouting", FIRST if insert else BEFORE_NAT)
    )
    yield Chain("tproxy_last", (*outside, arriving), Hook("filter", "prerouting", BEHIND_NAT))


_RUNNING = "what was handed over; an answer to a SYN cookie finds its listener only so"
_TAKEN = "the connection was redirected already"


def settled(parts: Parts) -> Iterator[Rule]:
    """Keep the nat chains that others have behind ours from changing what was handed over: NAT to where it goes."""
    if parts.policy.inbound.is_transparent and parts.policy.inbound.insert:
        yield from _to_where_it_goes(parts, _ARRIVED, "what was handed over keeps its destination")


def undisturbed(parts: Parts) -> Iterator[Rule]:
    """The same for what the data plane dials from its clients' addresses."""
    return _to_where_it_goes(parts, _DIALLED, "what was dialled keeps its destination")


def _to_where_it_goes(parts: Parts, mark: str, text: str) -> Iterator[Rule]:
    """Once a chain has set an address, no later one is asked, even if it is the same address."""
    for family in parts.families:
        ip = ADDRESS[family]
        yield Rule(join(parts.nfproto(family), TCP, mark), f"dnat {ip} to {ip} daddr", text)


def output_chains(parts: Parts) -> Iterator[Chain]:
    """The chain that sees the data plane dial, and applications answer."""
    if not parts.policy.inbound.is_transparent or not parts.families:
        return
    dialled = Rule(join(parts.guard(), SYN, from_client(parts)), f"ct mark set ct mark | {DIALLED_MARK:#x}", _DIALS)
    yield Chain(ANSWERS, (dialled, answer(parts.guard())), Hook("route", "output", MANGLE))


_DIALS = "t1: the data plane dials from a client's address"


def answer(guard: str = "") -> Rule:
    """Marks the answers of applications to clients in whose name the data plane has dialled."""
    text = "answers to a client's address go back to the data plane"
    return Rule(join(guard, "ct direction reply", _DIALLED), f"meta mark set meta mark | {ROUTE_MARK:#x}", text)


def from_client(parts: Parts) -> str:
    """Matches what the data plane sends to this host from an address that is not this host's."""
    return join(f"oifname {interface(parts.policy.loopback)}", parts.owner, "fib saddr type != local")


def called_chains(parts: Parts, inbound: Iterable[Rule]) -> Iterator[Chain]:
    """The chains that are jumped to. `inbound` are i4 to i7, which end at `HAND_OVER`."""
    policy = parts.policy
    if not policy.inbound.is_transparent:
        return
    yield Chain(INBOUND, (Rule("ct status dnat", "return", _TAKEN), *_of_virtual_networks(parts), *inbound))
    yield Chain(
        HAND_OVER,
        (
            Rule("", f"ct mark set ct mark | {ARRIVED_MARK:#x}", "to the inbound listener"),
            Rule(TCP, f"tproxy to :{policy.inbound.port} accept", "to the inbound listener"),
            *parts.reset("there is no inbound listener, or it is not transparent"),
        ),
    )


def _of_virtual_networks(parts: Parts) -> Iterator[Rule]:
    """v3 and i2 are asked before i0, and redirect in the nat chains."""
    for family in parts.families:
        for vnet in parts.policy.networks(family):
            carried = join(parts.nfproto(family), arrives_at(vnet))
            if parts.policy.dns.tcp:
                text = f"v3: DNS over TCP from {vnet.interface} is redirected"
                yield Rule(join(carried, f"tcp dport {DNS_PORT}"), "return", text)
            if vnet.network.prefixlen:
                elsewhere = f"{ADDRESS[family]} daddr != {vnet.network}"
                yield Rule(join(carried, elsewhere), "return", f"i2: leaves {vnet}, and is redirected")
