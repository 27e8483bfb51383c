"""What `--inbound-mode tproxy` adds to the table mangle, and to nat what keeps off the NAT of others. Pure.

`tpctl.engines.nftables.tproxy` says what the marks are for. Here TPROXY stands before everybody's NAT (mangle is -150),
and it drops what finds no transparent listener: iptables can refuse nothing before INPUT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tpctl.engines.base import ARRIVED_MARK, DIALLED_MARK, ROUTE_MARK, SIGNATURE
from tpctl.engines.iptables.parts import SYN, Jump, Parts, comment, dport, owned_by
from tpctl.engines.iptables.rule import Criterion, Match, Option, Rule, match
from tpctl.spec.policy import DNS_PORT, Family, Protocol

INBOUND = "TPCTL_TPROXY_INBOUND"
HAND_OVER = "TPCTL_TPROXY"
ANSWERS = "TPCTL_ANSWERS"
SETTLED = "TPCTL_TPROXY_SETTLED"

Chains = tuple[tuple[str, tuple[Rule, ...]], ...]


def _bit(mark: int) -> str:
    return f"{mark:#x}/{mark:#x}"


_ARRIVED = match("connmark", ("mark", _bit(ARRIVED_MARK)))
_DIALLED = match("connmark", ("mark", _bit(DIALLED_MARK)))
_TRANSLATED = match("conntrack", ("ctstate", "DNAT"))


def chains(parts: Parts, inbound: Iterable[Rule]) -> Chains:
    """Those of mangle. `inbound` are i4 to i7, which end at `HAND_OVER`."""
    taken = parts.leave("the connection was redirected already", matches=(_TRANSLATED,))
    outside = (*parts.from_outside(), *parts.excluded_arrivals())
    return (
        (INBOUND, (taken, *outside, *_of_virtual_networks(parts), *inbound)),
        (HAND_OVER, tuple(_hand_over(parts))),
        (ANSWERS, tuple(_answers(parts))),
    )


def jumps(parts: Parts, place: int) -> Iterator[Jump]:
    """Those of mangle; with `--redirect-inbound-insert-instead-of-append` from `place` on."""
    away = Criterion(parts.policy.loopback, negated=True)
    # While one mode replaces the other, table by table, a SYN may meet both TPROXY and REDIRECT. What follows it has to
    # be translated before its socket can be found.
    untranslated = Option("ctstate", ("DNAT",), negated=True)
    running = (_ARRIVED, match("conntrack", untranslated, ("ctdir", "ORIGINAL")))
    local = match("addrtype", ("dst-type", "LOCAL"))
    text = "what was handed over; an answer to a SYN cookie finds its listener only so"
    arriving = f"i0: new connections to this host {SIGNATURE}"
    rules = (
        Rule(HAND_OVER, protocol="tcp", matches=running, comment=comment(text)),
        Rule(INBOUND, protocol="tcp", in_interface=away, matches=(SYN, local), comment=comment(arriving)),
    )
    insert = parts.policy.inbound.insert
    yield from (Jump("PREROUTING", rule, number if insert else None) for number, rule in enumerate(rules, place))
    yield Jump("OUTPUT", Rule(ANSWERS, protocol="tcp", comment=comment("connections from a client's address")))


def settled() -> tuple[str, tuple[Rule, ...]]:
    """The chain of nat that keeps rules of others from changing what was handed over."""
    return SETTLED, (Rule("ACCEPT", comment=comment("what was handed over keeps its destination")),)


def settling() -> Rule:
    """The jump to it, which must stand at the top of nat PREROUTING."""
    return Rule(SETTLED, protocol="tcp", matches=(_ARRIVED,), comment=comment("connections that were handed over"))


def from_client(parts: Parts) -> tuple[Criterion, tuple[Match, ...]]:
    """The interface and matches of what the data plane sends to this host from an address that is not this host's."""
    elsewhere = match("addrtype", Option("src-type", ("LOCAL",), negated=True))
    return Criterion(parts.policy.loopback), (owned_by(parts.policy.proxy_uid), elsewhere)


def _hand_over(parts: Parts) -> Iterator[Rule]:
    text = comment("to the inbound listener")
    yield Rule("CONNMARK", target_options=(Option("set-xmark", (_bit(ARRIVED_MARK),)),), comment=text)
    options = (
        Option("on-port", (str(parts.policy.inbound.port),)),
        Option("on-ip", ("0.0.0.0" if parts.family is Family.IPV4 else "::",)),
        Option("tproxy-mark", ("0x0/0x0",)),
    )
    yield Rule("TPROXY", protocol="tcp", target_options=options, comment=text)


def _answers(parts: Parts) -> Iterator[Rule]:
    interface, matches = from_client(parts)
    yield Rule(
        "CONNMARK",
        protocol="tcp",
        out_interface=interface,
        matches=(SYN, *matches),
        target_options=(Option("set-xmark", (_bit(DIALLED_MARK),)),),
        comment=comment("t1: the data plane dials from a client's address"),
    )
    yield Rule(
        "MARK",
        matches=(_DIALLED, match("conntrack", ("ctdir", "REPLY"))),
        target_options=(Option("set-xmark", (_bit(ROUTE_MARK),)),),
        comment=comment("answers to a client's address go back to the data plane"),
    )


def _of_virtual_networks(parts: Parts) -> Iterator[Rule]:
    """v3 and i2 are asked before i0, and redirect in nat."""
    for vnet in parts.policy.networks(parts.family):
        interface = Criterion(vnet.interface)
        if parts.policy.dns.tcp:
            text = f"v3: DNS over TCP from {vnet.interface} is redirected"
            query = (dport(Protocol.TCP, DNS_PORT),)
            yield parts.leave(text, protocol="tcp", in_interface=interface, matches=query)
        elsewhere = Criterion(str(vnet.network), negated=True)
        text = f"i2: leaves {vnet}, and is redirected"
        yield parts.leave(text, in_interface=interface, destination=elsewhere)
