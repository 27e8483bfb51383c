"""The guard of the data plane's own ports (g1), in the table filter: iptables can refuse nothing in any other.

`tpctl.engines.nftables.guard` says how it tells what is aimed at the data plane from what was redirected. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpctl.engines.iptables.parts import SYN, Jump, Parts, TableRules, address, comment, dport, owned_by, port_matches
from tpctl.engines.iptables.rule import Criterion, Match, Option, Rule, match
from tpctl.spec.guard import guarded_ports
from tpctl.spec.policy import LINK_LOCAL6, Family, PortRange, Protocol

GUARD, GUARD_OWN = "TPCTL_GUARD", "TPCTL_GUARD_OWN"
_TEXT = "g1: opened to the data plane's own ports"
_AIMED = comment(_TEXT)
_LOCAL = match("addrtype", ("dst-type", "LOCAL"))
_UNREACHABLE = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}


def filtering(parts: Parts) -> TableRules:
    """The table filter. Its jumps stand first: behind somebody's ACCEPT they would not be asked."""
    aimed = tuple(_aimed(parts))
    if not aimed:
        return TableRules("filter")
    loopback = parts.policy.loopback
    away, own = Criterion(loopback, negated=True), Criterion(loopback)
    jumps = []
    for place, (protocol, matches) in enumerate(aimed, 1):
        arrived = (*matches, _LOCAL)
        rule = Rule(GUARD, protocol=protocol, in_interface=away, matches=arrived, comment=_AIMED)
        jumps.append(Jump("INPUT", rule, place))
        rule = Rule(GUARD_OWN, protocol=protocol, out_interface=own, matches=matches, comment=_AIMED)
        jumps.append(Jump("OUTPUT", rule, place))
    return TableRules("filter", ((GUARD, tuple(_refused(parts))), (GUARD_OWN, tuple(_own(parts)))), tuple(jumps))


def untranslated(parts: Parts) -> Iterator[Rule]:
    """The rule that leaves a chain for what is aimed at the data plane, so that no rule behind it redirects it."""
    ports = guarded_ports(parts.policy, Protocol.TCP)
    for ports_match in port_matches(Protocol.TCP, tuple(map(PortRange, ports))):
        yield parts.leave(_TEXT, protocol="tcp", matches=(ports_match, _LOCAL))


def _own(parts: Parts) -> Iterator[Rule]:
    yield parts.leave("g1: the data plane's user may check its health", matches=(owned_by(parts.policy.proxy_uid),))
    yield Rule(GUARD, comment=_AIMED)


def _refused(parts: Parts) -> Iterator[Rule]:
    translated = (match("conntrack", ("ctstate", "DNAT")),)
    yield parts.leave("g1: redirected, wherever it was going", matches=translated)
    unreachable = _UNREACHABLE[parts.family]
    if parts.family is Family.IPV6:  # a reset may leave by another link (Parts.reset() of the nftables engine)
        away = Criterion(parts.policy.loopback, negated=True)
        yield _reject(Protocol.TCP, unreachable, source=address(LINK_LOCAL6), out_interface=away)
    yield _reject(Protocol.TCP, "tcp-reset")
    yield _reject(Protocol.UDP, unreachable)


def _reject(protocol: Protocol, how: str, **criteria: Any) -> Rule:
    options = (Option("reject-with", (how,)),)
    return Rule("REJECT", protocol=protocol, target_options=options, comment=_AIMED, **criteria)


def _aimed(parts: Parts) -> Iterator[tuple[Protocol, tuple[Match, ...]]]:
    """Matches for first packets to the ports. Nothing else tells the first one of a flow of UDP."""
    for ports_match in port_matches(Protocol.TCP, tuple(map(PortRange, guarded_ports(parts.policy, Protocol.TCP)))):
        yield Protocol.TCP, (SYN, ports_match)
    for port in guarded_ports(parts.policy, Protocol.UDP):
        yield Protocol.UDP, (dport(Protocol.UDP, port), match("conntrack", ("ctstate", "NEW")))
