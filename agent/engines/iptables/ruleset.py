"""From a policy to the rules of one family: pure, and the same for both variants.

Only jumps stand in the built-in chains; everything else stands in chains of our own (`TPCTL_...`). So an exclusion does
not keep other software's rules from being asked, and whatever we installed is found again by its target.
Each rule's comment begins with the name it has in `agent.decide` and docs/ruleset.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agent.decide import CAPTURED_ZONE, UPSTREAM_ZONE
from agent.engines.iptables.rule import COMMENT_LIMIT, Criterion, Match, Option, Rule, match
from agent.policy import (
    ALL_PORTS,
    DNS_PORT,
    RESERVED,
    DnsCapture,
    Family,
    NameServer,
    Network,
    Policy,
    PortRange,
    Ports,
    Protocol,
    includes,
    of_family,
)

INBOUND = "TPCTL_INBOUND"
INBOUND_REDIRECT = "TPCTL_INBOUND_REDIRECT"
OUTBOUND = "TPCTL_OUTBOUND"
OUTBOUND_REDIRECT = "TPCTL_OUTBOUND_REDIRECT"
DNS = "TPCTL_DNS"
VIRTUAL_NETWORKS = "TPCTL_VNET"
INBOUND_LOG = "TPCTL_LOG_PREROUTING"
OUTBOUND_LOG = "TPCTL_LOG_OUTPUT"
ZONE_INBOUND = "TPCTL_ZONE_PREROUTING"
ZONE_OUTBOUND = "TPCTL_ZONE_OUTPUT"
ZONE_QUERY = "TPCTL_ZONE_QUERY"
INVALID = "TPCTL_DROP_INVALID"

COMMENT_PREFIX = "tpctl/"
MULTIPORT_SLOTS = 15
"""XT_MULTI_PORTS in include/uapi/linux/netfilter/xt_multiport.h; a range takes two."""

SYN = match("tcp", Option("tcp-flags", ("FIN,SYN,RST,ACK", "SYN")))
"""Only a connection's first segment is redirected: on a host whose conntrack was idle, running connections look new."""


@dataclass(frozen=True, slots=True)
class Jump:
    """A rule in a built-in chain."""

    chain: str
    rule: Rule
    position: int | None = None
    """1 is the top of the chain; None is its end."""


@dataclass(frozen=True, slots=True)
class TableRules:
    """What one table should hold of ours."""

    table: str
    chains: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
    jumps: tuple[Jump, ...] = ()


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """What one family should hold of ours. The order of the tables is the order in which they are applied."""

    family: Family
    tables: tuple[TableRules, ...]


def rules_for(policy: Policy, family: Family) -> FamilyRules:
    """The rules that make the kernel agree with `decide()` for one family.

    Zones come first: a query must not be redirected before its zone is chosen.
    """
    builder = _Builder(policy, family)
    tables = (builder.raw(), builder.mangle(), builder.nat())
    return FamilyRules(family, tuple(table for table in tables if table.chains))


def port_matches(protocol: Protocol, ports: Ports, *, direction: str = "dport") -> Iterator[Match]:
    """Matches that together cover `ports`, each small enough for one rule."""
    if len(ports) == 1:
        yield match(protocol, (direction, _port_text(ports, ":")))
        return
    slots = 0
    chunk: list[PortRange] = []
    for port in ports:
        size = 1 if port.first == port.last else 2
        if slots + size > MULTIPORT_SLOTS:
            yield match("multiport", (f"{direction}s", _port_text(tuple(chunk), ":")))
            slots, chunk = 0, []
        slots += size
        chunk.append(port)
    if chunk:
        yield match("multiport", (f"{direction}s", _port_text(tuple(chunk), ":")))


def _port_text(ports: Ports, dash: str) -> str:
    return ",".join(str(port).replace("-", dash) for port in ports)


def _owner(uids: object, *, negated: bool = False) -> Match:
    return match("owner", Option("uid-owner", (str(uids),), negated))


def _address(network: object) -> Criterion:
    return Criterion(str(network))


def _comment(text: str) -> str:
    return (COMMENT_PREFIX + text).encode()[: COMMENT_LIMIT - 1].decode(errors="ignore")


def _dport(protocol: Protocol, port: int) -> Match:
    return match(protocol, ("dport", str(port)))


class _Builder:
    """Builds the tables of one family."""

    def __init__(self, policy: Policy, family: Family) -> None:
        self.policy = policy
        self.family = family
        self.reserved = RESERVED[family]
        self.host_length = 32 if family is Family.IPV4 else 128

    # -- raw ---------------------------------------------------------------------------------------------------------

    def raw(self) -> TableRules:
        if not self.policy.splits_zones(self.family):
            return TableRules("raw")
        chains = (
            (ZONE_INBOUND, tuple(self._zone_inbound())),
            (ZONE_OUTBOUND, tuple(self._zone_outbound())),
            (ZONE_QUERY, tuple(self._zone_query())),
        )
        jumps = tuple(
            Jump(chain, Rule(own, protocol="udp", comment=_comment("conntrack zones of DNS")))
            for chain, own in (("PREROUTING", ZONE_INBOUND), ("OUTPUT", ZONE_OUTBOUND))
        )
        return TableRules("raw", chains, jumps)

    def _zone_rule(self, zone: int, text: str, **criteria: Any) -> Rule:
        options = (Option("zone", (str(zone),)),)
        return Rule("CT", protocol="udp", target_options=options, comment=_comment(text), **criteria)

    def _zone_inbound(self) -> Iterator[Rule]:
        query = (_dport(Protocol.UDP, DNS_PORT),)
        answer = (match("udp", ("sport", str(DNS_PORT))),)
        for vnet in self.policy.networks(self.family):
            interface = Criterion(vnet.interface)
            yield self._zone_rule(
                CAPTURED_ZONE, f"z6: a query from {vnet.interface}", in_interface=interface, matches=query
            )
        forwarded = (*query, match("addrtype", Option("dst-type", ("LOCAL",), negated=True)))
        if self.policy.dns.capture is DnsCapture.ALL:
            yield self._zone_rule(UPSTREAM_ZONE, "z7: a forwarded query", matches=forwarded)
            yield self._zone_rule(UPSTREAM_ZONE, "z4: an answer", matches=answer)
            return
        for server in self.policy.servers(self.family):
            here = self._host(server)
            scope = Criterion(server.interface) if server.interface else None
            yield self._zone_rule(
                UPSTREAM_ZONE,
                f"z7: a forwarded query to {server}",
                destination=here,
                in_interface=scope,
                matches=forwarded,
            )
            yield self._zone_rule(
                UPSTREAM_ZONE, f"z4: an answer of {server}", source=here, in_interface=scope, matches=answer
            )

    def _zone_outbound(self) -> Iterator[Rule]:
        query = (_dport(Protocol.UDP, DNS_PORT),)
        for criteria in self._captured_servers():
            yield Rule(
                ZONE_QUERY, protocol="udp", matches=query, comment=_comment("a query to a captured server"), **criteria
            )
        answer = match("udp", ("sport", str(self.policy.dns.port)))
        text = "z2: the data plane answers an application"
        yield self._zone_rule(CAPTURED_ZONE, text, matches=(answer, _owner(self.policy.proxy_uid)))
        for server in self.policy.servers(self.family):
            if self.policy.dns.capture is DnsCapture.LISTED and server.address.is_loopback:
                yield self._zone_rule(
                    UPSTREAM_ZONE,
                    f"z3: the local resolver {server} answers the data plane",
                    source=self._host(server),
                    destination=_address(self.reserved.local),
                )

    def _zone_query(self) -> Iterator[Rule]:
        text = "z1: the data plane asks its name server"
        yield self._zone_rule(UPSTREAM_ZONE, text, matches=(_owner(self.policy.proxy_uid),))
        for uids in self._dns_excluded_uids():
            yield self._zone_rule(UPSTREAM_ZONE, f"z5: excluded uids {uids}", matches=(_owner(uids),))
        for network in self._excluded_destinations():
            yield self._zone_rule(UPSTREAM_ZONE, "z5: excluded destination", destination=_address(network))
        yield self._zone_rule(CAPTURED_ZONE, "z3: a query that is redirected")

    # -- mangle ------------------------------------------------------------------------------------------------------

    def mangle(self) -> TableRules:
        if not self.policy.drop_invalid:
            return TableRules("mangle")
        drop = Rule("DROP", comment=_comment("i1: invalid packets are dropped"))
        invalid = (match("conntrack", ("ctstate", "INVALID")),)
        jump = Jump("PREROUTING", Rule(INVALID, matches=invalid, comment=_comment("packets conntrack cannot place")))
        return TableRules("mangle", ((INVALID, (drop,)),), (jump,))

    # -- nat ---------------------------------------------------------------------------------------------------------

    def nat(self) -> TableRules:
        policy = self.policy
        chains = [
            (INBOUND, tuple(self._inbound())),
            (INBOUND_REDIRECT, (self._redirect(Protocol.TCP, policy.inbound.port, "to the inbound listener"),)),
            (OUTBOUND, tuple(self._outbound())),
            (OUTBOUND_REDIRECT, (self._redirect(Protocol.TCP, policy.outbound.port, "to the outbound listener"),)),
        ]
        if policy.networks(self.family):
            chains.append((VIRTUAL_NETWORKS, tuple(self._virtual_networks())))
        if policy.captures_dns(self.family):
            chains.append((DNS, tuple(self._dns())))
        if policy.log_level is not None:
            chains += [(INBOUND_LOG, (self._log("PREROUTING:"),)), (OUTBOUND_LOG, (self._log("OUTPUT:"),))]
        return TableRules("nat", tuple(chains), (*self._prerouting(), *self._output()))

    def _prerouting(self) -> Iterator[Jump]:
        networks = bool(self.policy.networks(self.family))
        jumps = []
        if self.policy.log_level is not None:
            jumps.append(Rule(INBOUND_LOG, comment=_comment("log connections that arrive")))
        if networks:
            jumps.append(Rule(VIRTUAL_NETWORKS, comment=_comment("connections of virtual networks")))
        local = match("addrtype", ("dst-type", "LOCAL"))
        text = "i0: new connections to this host"
        jumps.append(Rule(INBOUND, protocol="tcp", matches=(SYN, local), comment=_comment(text)))
        insert = networks or self.policy.inbound.insert
        return (Jump("PREROUTING", rule, place if insert else None) for place, rule in enumerate(jumps, 1))

    def _output(self) -> Iterator[Jump]:
        first = []
        if self.policy.log_level is not None:
            first.append(Rule(OUTBOUND_LOG, comment=_comment("log connections that leave")))
        if self.policy.captures_dns(self.family):
            query = (_dport(Protocol.UDP, DNS_PORT),)
            first.append(Rule(DNS, protocol="udp", matches=query, comment=_comment("DNS queries")))
        outbound = Rule(OUTBOUND, protocol="tcp", matches=(SYN,), comment=_comment("new connections of this host"))
        if self.policy.outbound.insert:
            first.append(outbound)
        yield from (Jump("OUTPUT", rule, place) for place, rule in enumerate(first, 1))
        if not self.policy.outbound.insert:
            yield Jump("OUTPUT", outbound)

    def _inbound(self) -> Iterator[Rule]:
        inbound = self.policy.inbound
        if not inbound.enabled:
            yield self._return("i3: inbound redirection is off")
            return
        for network in of_family(inbound.exclude_sources, self.family):
            yield self._return(f"i4: excluded source {network}", source=_address(network))
        yield from self._by_port(inbound.include_ports, inbound.exclude_ports, INBOUND_REDIRECT, ("i5", "i6", "i7"))

    def _by_port(self, include: Ports, exclude: Ports, redirect: str, names: tuple[str, str, str]) -> Iterator[Rule]:
        included, excluded, everything = names
        if include:
            for ports in port_matches(Protocol.TCP, include):
                yield Rule(redirect, protocol="tcp", matches=(ports,), comment=_comment(f"{included}: included ports"))
            return
        for ports in port_matches(Protocol.TCP, exclude):
            yield self._return(f"{excluded}: excluded ports", protocol="tcp", matches=(ports,))
        yield Rule(redirect, protocol="tcp", comment=_comment(f"{everything}: everything else"))

    def _outbound(self) -> Iterator[Rule]:
        outbound = self.policy.outbound
        yield from self._excluded_uids(Protocol.TCP)
        for network in self._excluded_destinations():
            yield self._return(f"x2: excluded destination {network}", destination=_address(network))
        if self.policy.captures_dns(self.family):
            yield from self._dns_over_tcp()
        if not outbound.enabled:
            yield self._return("o0: outbound redirection is off")
            return
        if not outbound.include_ports:
            for ports in port_matches(Protocol.TCP, outbound.exclude_ports):
                yield self._return("o1: excluded ports", protocol="tcp", matches=(ports,))
        yield from self._outbound_by_owner()
        yield from self._by_port(outbound.include_ports, (), OUTBOUND_REDIRECT, ("o7", "o1", "o7"))

    def _outbound_by_owner(self) -> Iterator[Rule]:
        proxy = _owner(self.policy.proxy_uid)
        loopback = Criterion(self.policy.loopback)
        local, passthrough = _address(self.reserved.local), _address(self.reserved.passthrough)
        text = "o2: the data plane reaches the application"
        yield self._return(text, source=passthrough, out_interface=loopback)
        yield Rule(
            INBOUND,
            out_interface=loopback,
            destination=Criterion(local.value, negated=True),
            matches=(proxy,),
            comment=_comment("o3: the data plane calls this host's own address"),
        )
        others = _owner(self.policy.proxy_uid, negated=True)
        yield self._return("o4: applications that talk to this host", out_interface=loopback, matches=(others,))
        yield self._return("o5: the data plane's own connections", matches=(proxy,))
        yield self._return("o6: this host", destination=local)

    def _dns_over_tcp(self) -> Iterator[Rule]:
        query = (_dport(Protocol.TCP, DNS_PORT), _owner(self.policy.proxy_uid, negated=True))
        if self.policy.dns.tcp:
            for criteria in self._captured_servers():
                yield self._redirect(Protocol.TCP, self.policy.dns.port, "d4: DNS over TCP", matches=query, **criteria)
        yield self._return("x4: DNS over TCP passes", protocol="tcp", matches=query)

    def _dns(self) -> Iterator[Rule]:
        for uids in self._dns_excluded_uids():
            yield self._return(f"x1: excluded uids {uids}", matches=(_owner(uids),))
        for network in self._excluded_destinations():
            yield self._return(f"x2: excluded destination {network}", destination=_address(network))
        proxy = _owner(self.policy.proxy_uid)
        yield self._return("d2: the data plane asks its name server", matches=(proxy,))
        for criteria in self._captured_servers():
            yield self._redirect(Protocol.UDP, self.policy.dns.port, "d3: to the DNS listener", **criteria)

    def _virtual_networks(self) -> Iterator[Rule]:
        policy = self.policy
        for vnet in policy.networks(self.family):
            interface = Criterion(vnet.interface)
            query = (_dport(Protocol.UDP, DNS_PORT),)
            text = f"v1: DNS from {vnet.interface}"
            yield self._redirect(Protocol.UDP, policy.dns.port, text, in_interface=interface, matches=query)
            if policy.dns.tcp:
                query = (match("tcp", ("dport", str(DNS_PORT)), *SYN.options),)
                text = f"v3: DNS over TCP from {vnet.interface}"
                yield self._redirect(Protocol.TCP, policy.dns.port, text, in_interface=interface, matches=query)
            elsewhere = Criterion(str(vnet.network), negated=True)
            yield Rule(
                OUTBOUND_REDIRECT,
                protocol="tcp",
                in_interface=interface,
                destination=elsewhere,
                matches=(SYN,),
                comment=_comment(f"i2: leaves {vnet}"),
            )

    # -- parts -------------------------------------------------------------------------------------------------------

    def _captured_servers(self) -> Iterator[dict[str, Any]]:
        """The criteria of each captured server; nothing at all stands for every server."""
        if self.policy.dns.capture is DnsCapture.ALL:
            yield {}
            return
        for server in self.policy.servers(self.family):
            criteria = {"destination": self._host(server)}
            if server.interface:
                criteria["out_interface"] = Criterion(server.interface)
            yield criteria

    def _host(self, server: NameServer) -> Criterion:
        return Criterion(f"{server.address}/{self.host_length}")

    def _excluded_destinations(self) -> Iterator[Network]:
        return of_family(self.policy.outbound.exclude_destinations, self.family)

    def _excluded_uids(self, protocol: Protocol) -> Iterator[Rule]:
        for exclusion in self.policy.outbound.exclude_uids:
            if exclusion.protocol is not protocol:
                continue
            text = f"x1: excluded uids {exclusion.uids}"
            owner = _owner(exclusion.uids)
            if ALL_PORTS in exclusion.ports:
                yield self._return(text, protocol=protocol, matches=(owner,))
                continue
            for ports in port_matches(protocol, exclusion.ports):
                yield self._return(text, protocol=protocol, matches=(ports, owner))

    def _dns_excluded_uids(self) -> Iterator[object]:
        for exclusion in self.policy.outbound.exclude_uids:
            if exclusion.protocol is Protocol.UDP and includes(exclusion.ports, DNS_PORT):
                yield exclusion.uids

    def _return(self, text: str, **criteria: Any) -> Rule:
        return Rule("RETURN", comment=_comment(text), **criteria)

    def _redirect(self, protocol: Protocol, port: int, text: str, **criteria: Any) -> Rule:
        options = (Option("to-ports", (str(port),)),)
        return Rule("REDIRECT", protocol=protocol, target_options=options, comment=_comment(text), **criteria)

    def _log(self, prefix: str) -> Rule:
        options = (Option("log-prefix", (prefix,)), Option("log-level", (str(self.policy.log_level),)))
        return Rule("LOG", target_options=options, comment=_comment("log"))
