"""From a policy to the rules of one family: pure, and the same for both variants.

Only jumps stand in the built-in chains; everything else stands in chains of our own (`TPCTL_...`). So an exclusion does
not keep other software's rules from being asked, and whatever we installed is found again by its target.
Each rule's comment begins with the name it has in `tpctl.spec.decide` and docs/ruleset.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tpctl.engines.base import SIGNATURE
from tpctl.engines.iptables import guard, tproxy
from tpctl.engines.iptables.parts import (
    SYN,
    FamilyRules,
    Jump,
    Parts,
    TableRules,
    address,
    comment,
    dport,
    owned_by,
    port_matches,
    within,
)
from tpctl.engines.iptables.rule import Criterion, Option, Rule, match
from tpctl.engines.iptables.zones import ZoneRules
from tpctl.spec.policy import (
    ALL_PORTS,
    DNS_PORT,
    Family,
    Policy,
    Ports,
    Protocol,
    of_family,
)

ARRIVING = "TPCTL_ARRIVING"
INBOUND = "TPCTL_INBOUND"
INBOUND_REDIRECT = "TPCTL_INBOUND_REDIRECT"
OUTBOUND = "TPCTL_OUTBOUND"
OUTBOUND_REDIRECT = "TPCTL_OUTBOUND_REDIRECT"
DNS = "TPCTL_DNS"
DNS_SOURCE = "TPCTL_DNS_SOURCE"
VIRTUAL_NETWORKS = "TPCTL_VNET"
INBOUND_LOG = "TPCTL_LOG_PREROUTING"
OUTBOUND_LOG = "TPCTL_LOG_OUTPUT"
INVALID = "TPCTL_DROP_INVALID"
LEAVING = "TPCTL_LEAVING"


def rules_for(policy: Policy, family: Family) -> FamilyRules:
    """The rules that make the kernel agree with `decide()` for one family.

    Zones come before NAT: a query must not be redirected before its zone is chosen. So does the guard, to which NAT
    leaves what is aimed at the data plane.
    """
    builder = NatRules(policy, family)
    tables = (guard.filtering(builder), ZoneRules(policy, family).raw(), builder.mangle(), builder.nat())
    return FamilyRules(family, tuple(table for table in tables if table.chains))


def without_nat(rules: FamilyRules) -> FamilyRules:
    """The rules for a kernel that has REDIRECT, but neither DNAT nor SNAT: the address changes with the port."""

    def changed(rule: Rule) -> Rule:
        if rule.target != "DNAT":
            return rule
        (option,) = rule.target_options
        ports = Option("to-ports", (option.values[0].removeprefix(":"),))
        return replace(rule, target="REDIRECT", target_options=(ports,))

    def fitted(table: TableRules) -> TableRules:
        chains = ((name, tuple(map(changed, content))) for name, content in table.chains if name != DNS_SOURCE)
        return replace(table, chains=tuple(chains), jumps=tuple(j for j in table.jumps if j.rule.target != DNS_SOURCE))

    return replace(rules, tables=tuple(map(fitted, rules.tables)))


class NatRules(Parts):
    """The tables nat and mangle of one family."""

    def mangle(self) -> TableRules:
        """The table mangle: invalid packets are dropped, TPROXY hands over what arrives, and d1."""
        chains: tproxy.Chains = ()
        jumps: tuple[Jump, ...] = ()
        transparent, insert = self.policy.inbound.is_transparent, self.policy.inbound.insert
        if self.policy.drop_invalid:
            drop = Rule("DROP", comment=comment("i1: invalid packets are dropped"))
            invalid = (match("conntrack", ("ctstate", "INVALID")),)
            rule = Rule(INVALID, matches=invalid, comment=comment("packets conntrack cannot place"))
            chains, jumps = (
                ((INVALID, (*self.excluded_arrivals(), drop)),),
                (Jump("PREROUTING", rule, 1 if transparent and insert else None),),
            )
        if transparent:
            chains += tproxy.chains(self, self._inbound(tproxy.HAND_OVER))
            jumps += tuple(tproxy.jumps(self, 1 + len(jumps)))
        if self.policy.redirects_own(self.family):
            chains += ((LEAVING, tuple(self._leaving())),)
            jumps += (self._away(),)
        return TableRules("mangle", chains, jumps)

    def _away(self) -> Jump:
        """What was redirected and leaves all the same: where the socket's interface does not lead to loopback.

        Only here is it known: where the redirect stands, a packet of a bound socket looks like any other.
        """
        translated = (match("conntrack", ("ctstate", "DNAT")),)
        rule = Rule(
            LEAVING,
            destination=address(self.reserved.local),
            out_interface=Criterion(self.policy.loopback, negated=True),
            matches=translated,
            comment=comment("redirected, but bound to another interface"),
        )
        return Jump("POSTROUTING", rule)

    def _leaving(self) -> Iterator[Rule]:
        listeners = [(Protocol.TCP, self.policy.outbound.port)] if self.policy.outbound.enabled else []
        if self.policy.captures_dns(self.family):
            listeners += [(each, self.policy.dns.port) for each in Protocol if each == "udp" or self.policy.dns.tcp]
        for protocol, port in listeners:
            text = comment("d1: redirected, but bound to another interface")
            yield Rule("DROP", protocol=protocol, matches=(dport(protocol, port),), comment=text)

    def nat(self) -> TableRules:
        """The table nat, which does the redirecting."""
        policy = self.policy
        chains = [
            (INBOUND, tuple(self._inbound(INBOUND_REDIRECT))),
            (INBOUND_REDIRECT, (self.translate(Protocol.TCP, policy.inbound.port, "to the inbound listener"),)),
            (OUTBOUND, tuple(self._outbound())),
            (OUTBOUND_REDIRECT, (self.redirect(Protocol.TCP, policy.outbound.port, "to the outbound listener"),)),
        ]
        if policy.inbound.is_transparent:
            chains.append(tproxy.settled())
        else:
            arriving = Rule(INBOUND, comment=comment("i3 to i7: whatever else arrives"))
            outside = (*guard.untranslated(self), *self.from_outside(), *self.excluded_arrivals())
            chains.append((ARRIVING, (*outside, arriving)))
        if policy.networks(self.family):
            chains.append((VIRTUAL_NETWORKS, tuple(self._virtual_networks())))
        if policy.captures_dns(self.family):
            chains += [(DNS, tuple(self._dns())), (DNS_SOURCE, (self._from_local(),))]
        if policy.log_level is not None:
            chains += [(INBOUND_LOG, (self._log("PREROUTING:"),)), (OUTBOUND_LOG, (self._log("OUTPUT:"),))]
        return TableRules("nat", tuple(chains), (*self._prerouting(), *self._output(), *self._postrouting()))

    def _prerouting(self) -> Iterator[Jump]:
        networks = bool(self.policy.networks(self.family))
        jumps = []
        if self.policy.log_level is not None:
            jumps.append(Rule(INBOUND_LOG, comment=comment("log connections that arrive")))
        if networks:
            jumps.append(Rule(VIRTUAL_NETWORKS, comment=comment("connections of virtual networks")))
        if not self.policy.inbound.is_transparent:
            local = match("addrtype", ("dst-type", "LOCAL"))
            text = f"i0: new connections to this host {SIGNATURE}"
            jumps.append(Rule(ARRIVING, protocol="tcp", matches=(SYN, local), comment=comment(text)))
        else:
            jumps.append(tproxy.settling())
        insert = networks or self.policy.inbound.insert or self.policy.inbound.is_transparent
        return (Jump("PREROUTING", rule, place if insert else None) for place, rule in enumerate(jumps, 1))

    def _output(self) -> Iterator[Jump]:
        first = []
        if self.policy.log_level is not None:
            first.append(Rule(OUTBOUND_LOG, comment=comment("log connections that leave")))
        if self.policy.captures_dns(self.family):
            query = (dport(Protocol.UDP, DNS_PORT), *self.inside())
            first.append(Rule(DNS, protocol="udp", matches=query, comment=comment(f"DNS queries{self.whose}")))
        text = f"new connections of this host{self.whose}"
        outbound = Rule(OUTBOUND, protocol="tcp", matches=(SYN, *self.inside()), comment=comment(text))
        if self.policy.outbound.insert:
            first.append(outbound)
        yield from (Jump("OUTPUT", rule, place) for place, rule in enumerate(first, 1))
        if not self.policy.outbound.insert:
            yield Jump("OUTPUT", outbound)

    def _postrouting(self) -> Iterator[Jump]:
        """Lets every DNS listener answer from the address it was asked at.

        One that is bound to a wildcard address, and does not care (IP_PKTINFO), answers from the address that the
        kernel takes for the way to the client: with the host's own address, that is this one, and not the local one.
        """
        if self.policy.captures_dns(self.family):
            redirected = match("conntrack", ("ctstate", "DNAT"), ("ctorigdstport", str(DNS_PORT)))
            rule = Rule(
                DNS_SOURCE,
                protocol="udp",
                destination=address(self.reserved.local),
                out_interface=Criterion(self.policy.loopback),
                matches=(dport(Protocol.UDP, self.policy.dns.port), redirected),
                comment=comment("redirected DNS queries"),
            )
            yield Jump("POSTROUTING", rule, 1)

    def _from_local(self) -> Rule:
        options = (Option("to-source", (str(self.reserved.local.network_address),)),)
        text = comment("d5: a redirected query comes from the local address")
        return Rule("SNAT", protocol="udp", target_options=options, comment=text)

    def _inbound(self, listener: str) -> Iterator[Rule]:
        inbound = self.policy.inbound
        if not inbound.enabled:
            yield self.leave("i3: inbound redirection is off")
            return
        for network in of_family(inbound.exclude_sources, self.family):
            yield self.leave(f"i4: excluded source {network}", source=within(network))
        yield from self._by_port(inbound.include_ports, inbound.exclude_ports, listener, ("i5", "i6", "i7"))

    def _by_port(self, include: Ports, exclude: Ports, redirect: str, names: tuple[str, str, str]) -> Iterator[Rule]:
        included, excluded, everything = names
        if include:
            for ports in port_matches(Protocol.TCP, include):
                yield Rule(redirect, protocol="tcp", matches=(ports,), comment=comment(f"{included}: included ports"))
            return
        for ports in port_matches(Protocol.TCP, exclude):
            yield self.leave(f"{excluded}: excluded ports", protocol="tcp", matches=(ports,))
        yield Rule(redirect, protocol="tcp", comment=comment(f"{everything}: everything else"))

    def _outbound(self) -> Iterator[Rule]:
        outbound = self.policy.outbound
        yield from self.scoped_destinations()
        yield from self._excluded_departures()
        yield from self._excluded_uids(Protocol.TCP)
        for network in self.excluded_destinations():
            yield self.leave(f"x2: excluded destination {network}", destination=within(network))
        if self.policy.captures_dns(self.family):
            yield from self._dns_over_tcp()
        if not outbound.enabled:
            yield self.leave("o0: outbound redirection is off")
            return
        if not outbound.include_ports:
            for ports in port_matches(Protocol.TCP, outbound.exclude_ports):
                yield self.leave("o1: excluded ports", protocol="tcp", matches=(ports,))
        yield from self._outbound_by_owner()
        yield from self._by_port(outbound.include_ports, (), OUTBOUND_REDIRECT, ("o7", "o1", "o7"))

    def _outbound_by_owner(self) -> Iterator[Rule]:
        proxy = owned_by(self.policy.proxy_uid)
        loopback = Criterion(self.policy.loopback)
        local, passthrough = address(self.reserved.local), address(self.reserved.passthrough)
        text = "o2: the data plane reaches the application"
        yield self.leave(text, source=passthrough, out_interface=loopback)
        if self.policy.inbound.is_transparent:
            text = "t1: the data plane reaches the application from the client's address"
            interface, matches = tproxy.from_client(self)
            yield self.leave(text, out_interface=interface, matches=matches)
        yield Rule(
            INBOUND,
            out_interface=loopback,
            destination=Criterion(local.value, negated=True),
            matches=(proxy,),
            comment=comment("o3: the data plane calls this host's own address"),
        )
        others = owned_by(self.policy.proxy_uid, negated=True)
        yield self.leave("o4: applications that talk to this host", out_interface=loopback, matches=(others,))
        yield self.leave("o5: the data plane's own connections", matches=(proxy,))
        yield self.leave("o6: this host", destination=local)

    def _dns_over_tcp(self) -> Iterator[Rule]:
        query = (dport(Protocol.TCP, DNS_PORT), owned_by(self.policy.proxy_uid, negated=True))
        if self.policy.dns.tcp:
            for criteria in self.captured_servers():
                yield self.redirect(Protocol.TCP, self.policy.dns.port, "d4: DNS over TCP", matches=query, **criteria)
        yield self.leave("x4: DNS over TCP passes", protocol="tcp", matches=query)

    def _dns(self) -> Iterator[Rule]:
        yield from self.scoped_destinations()
        yield from self._excluded_departures()
        for uids in self.dns_excluded_uids():
            yield self.leave(f"x1: excluded uids {uids}", matches=(owned_by(uids),))
        for network in self.excluded_destinations():
            yield self.leave(f"x2: excluded destination {network}", destination=within(network))
        proxy = owned_by(self.policy.proxy_uid)
        yield self.leave("d2: the data plane asks its name server", matches=(proxy,))
        for criteria in self.captured_servers():
            yield self.redirect(Protocol.UDP, self.policy.dns.port, "d3: to the DNS listener", **criteria)

    def _virtual_networks(self) -> Iterator[Rule]:
        policy = self.policy
        yield from guard.untranslated(self)
        yield from self.from_outside()
        yield from self.excluded_members()
        for vnet in policy.networks(self.family):
            interface = Criterion(vnet.interface)
            query = (dport(Protocol.UDP, DNS_PORT),)
            text = f"v1: DNS from {vnet.interface}"
            yield self.redirect(Protocol.UDP, policy.dns.port, text, in_interface=interface, matches=query)
            if policy.dns.tcp:
                query = (match("tcp", ("dport", str(DNS_PORT)), *SYN.options),)
                text = f"v3: DNS over TCP from {vnet.interface}"
                yield self.redirect(Protocol.TCP, policy.dns.port, text, in_interface=interface, matches=query)
            elsewhere = Criterion(str(vnet.network), negated=True)
            yield Rule(
                OUTBOUND_REDIRECT,
                protocol="tcp",
                in_interface=interface,
                destination=elsewhere,
                matches=(SYN,),
                comment=comment(f"i2: leaves {vnet}"),
            )

    def _excluded_departures(self) -> Iterator[Rule]:
        return (self.leave(text, **criteria) for text, criteria in self.excluded_departures())

    def _excluded_uids(self, protocol: Protocol) -> Iterator[Rule]:
        for exclusion in self.policy.outbound.exclude_uids:
            if exclusion.protocol is not protocol:
                continue
            text = f"x1: excluded uids {exclusion.uids}"
            owner = owned_by(exclusion.uids)
            if ALL_PORTS in exclusion.ports:
                yield self.leave(text, protocol=protocol, matches=(owner,))
                continue
            for ports in port_matches(protocol, exclusion.ports):
                yield self.leave(text, protocol=protocol, matches=(ports, owner))

    def _log(self, prefix: str) -> Rule:
        options = (Option("log-prefix", (prefix,)), Option("log-level", (str(self.policy.log_level),)))
        return Rule("LOG", target_options=options, comment=comment("log"))
