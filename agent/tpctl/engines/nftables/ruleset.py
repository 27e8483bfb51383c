"""From a policy to the one table of the nftables engine. Pure.

Four things of nf_tables shape it (docs/ruleset.md):

- Chains of other tables at the same hook are asked whatever ours say, until one of them sets an address. `accept` ends
  only our own base chain; so an exclusion never keeps other software's rules from being asked.
- Of two chains of equal priority at a hook the one registered last runs first. So ours never stand at the -100 that
  everybody uses: "after the rules of others" is -99 (-98 for what arrives, see `tproxy`) and "before them" -101.
- `meta skuid != U` does not match packets without an owner. Where the specification says "not owned by U", U's packets
  are sent past the rule first.
- The first `ct zone set` a packet meets counts; later ones are without effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tpctl.engines.base import SIGNATURE
from tpctl.engines.nftables import guard, tproxy
from tpctl.engines.nftables.intervals import uids_and_ports
from tpctl.engines.nftables.parts import (
    ADDRESS,
    QUERY,
    SYN,
    TCP,
    Parts,
    arrives_at,
    interface,
    join,
    redirect_to,
    translate_to,
)
from tpctl.engines.nftables.table import AND, UID_AND_PORT, Chain, Hook, Rule, Table
from tpctl.engines.nftables.zones import zone_chains
from tpctl.spec.policy import ALL_PORTS, DNS_PORT, LINK_LOCAL6, RESERVED, Family, Policy, Protocol, VirtualNetwork

MANGLE = -150
FIRST = -101
LAST = -99
ARRIVING_LAST = -98
"""Leaves room for a chain of `tproxy` behind the rules of others and before ours."""

SOURCE = 99
"""Before the rules of others in postrouting, where everybody uses 100."""
DNS_SOURCE = "dns_source"
_TO_PORT = re.compile(r"dnat ip6? to ip6? daddr:(\d+)")

LOG_LEVELS = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")


def table_for(policy: Policy) -> Table:
    """The table that makes the kernel agree with `decide()`. Raises InputError for an interface nft cannot name."""
    return _Builder(policy).table()


def without_nat(table: Table) -> Table:
    """The table for a kernel that has REDIRECT, but neither DNAT nor SNAT: the address changes with the port."""

    def changed(rule: Rule) -> Rule:
        found = _TO_PORT.fullmatch(rule.action)
        return rule._replace(action=redirect_to(int(found[1]))) if found else rule

    kept = (
        chain._replace(rules=tuple(changed(rule) for rule in chain.rules))
        for chain in table.chains
        if chain.name != DNS_SOURCE
    )
    return table._replace(chains=tuple(kept))


class _Builder(Parts):
    def table(self) -> Table:
        chains = (*zone_chains(self), *self._invalid(), *tproxy.prerouting_chains(self), *self._prerouting())
        chains += (*tproxy.output_chains(self), *self._output(), self._leaving(), self._dns_source())
        chains += (*guard.base_chains(self), *self._called(), *guard.called_chains(self))
        # A base chain costs every packet a call, even an empty one.
        based = tuple(chain for chain in chains if chain.hook and chain.rules)
        # Those that are called come last: they are made again with each policy, and so keep their place.
        return Table(tuple(self.sets.values()), (*based, *(chain for chain in chains if chain.hook is None)))

    # -- base chains -------------------------------------------------------------------------------------------------

    def _invalid(self) -> Iterator[Chain]:
        if self.policy.drop_invalid and self.families:
            rule = Rule(join(self.guard(), "ct state invalid"), "drop", "i1: invalid packets are dropped")
            yield Chain("drop_invalid", (*self.excluded_arrivals(), rule), Hook("filter", "prerouting", MANGLE))

    def _prerouting(self) -> Iterator[Chain]:
        """A family with virtual networks goes before the rules of others, as with iptables.

        What goes before is asked once more after them: otherwise a packet that is between the two chains while one
        policy replaces another could pass the first before it has the rules and the second when it has them no more.
        """
        policy = self.policy
        first = tuple(family for family in self.families if policy.inbound.insert or policy.networks(family))
        last = tuple(family for family in self.families if family not in first)
        rules = [*tproxy.settled(self), *self._log("PREROUTING:", first)]
        if first:
            rules += (*guard.untranslated(self, first), *self.from_outside(), *self.excluded_arrivals())
        for family in first:
            for vnet in policy.networks(family):
                rules += self._virtual_network(family, vnet)
        yield Chain("prerouting_first", (*rules, *self._arriving(first)), Hook("nat", "prerouting", FIRST))
        arriving = tuple(self._arriving(self.families))
        rules = [*self._log("PREROUTING:", last)]
        if arriving:
            rules += (*guard.untranslated(self, self.families), *self.from_outside())
            rules += (*self.excluded_arrivals(), *arriving)
        yield Chain("prerouting_last", tuple(rules), Hook("nat", "prerouting", ARRIVING_LAST))

    def _arriving(self, families: tuple[Family, ...]) -> Iterator[Rule]:
        if families and not self.policy.inbound.is_transparent:
            local = join(self.guard(families), SYN, "fib daddr type local")
            yield Rule(local, "jump inbound", f"i0: new connections to this host {SIGNATURE}")

    def _virtual_network(self, family: Family, vnet: VirtualNetwork) -> Iterator[Rule]:
        dns, outbound = self.policy.dns, self.policy.outbound
        carried = join(self.nfproto(family), arrives_at(vnet))
        yield Rule(join(carried, QUERY), redirect_to(dns.port), f"v1: DNS from {vnet.interface}")
        if dns.tcp:
            query = join(carried, SYN, f"tcp dport {DNS_PORT}")
            yield Rule(query, redirect_to(dns.port), f"v3: DNS over TCP from {vnet.interface}")
        if vnet.network.prefixlen:
            elsewhere = f"{ADDRESS[family]} daddr != {vnet.network}"
            yield Rule(join(carried, elsewhere, SYN), redirect_to(outbound.port), f"i2: leaves {vnet}")

    def _output(self) -> Iterator[Chain]:
        """As with the connections that arrive, what goes before the rules of others is asked after them as well."""
        text = f"new connections of this host{self.whose}"
        outbound = Rule(join(self.guard(), SYN, self.inside), "jump outbound", text)
        jump = (outbound,) if self.families else ()
        first = [*self._log("OUTPUT:", self.families)]
        if self.capturing:
            query = join(self.guard(self.capturing), QUERY, self.inside)
            first.append(Rule(query, "jump dns", f"DNS queries{self.whose}"))
        insert = self.policy.outbound.insert
        yield Chain("output_first", (*first, *(jump if insert else ())), Hook("nat", "output", FIRST))
        yield Chain("output_last", jump, Hook("nat", "output", LAST))

    def _leaving(self) -> Chain:
        """Drops what was redirected and leaves all the same: where the socket's interface does not lead to loopback.

        Only here is it known: where the redirect stands, a packet of a bound socket looks like any other.
        """
        rules = []
        for family in self.families:
            local = f"{ADDRESS[family]} daddr {RESERVED[family].local.network_address}"
            away = join(f"oifname != {interface(self.policy.loopback)}", local, "ct status dnat")
            for match in self._own_listeners(family):
                rules.append(Rule(join(away, match), "drop", "d1: redirected, but bound to another interface"))
        return Chain("leaving", tuple(rules), Hook("filter", "postrouting", MANGLE))

    def _dns_source(self) -> Chain:
        """Lets every DNS listener answer from the address it was asked at.

        One that is bound to a wildcard address, and does not care (IP_PKTINFO), answers from the address that the
        kernel takes for the way to the client: with the host's own address, that is this one, and not the local one.
        """
        rules = []
        for family in self.capturing:
            ip, local = ADDRESS[family], RESERVED[family].local.network_address
            query = (
                f"{ip} daddr {local} udp dport {self.policy.dns.port} ct status dnat ct original proto-dst {DNS_PORT}"
            )
            match = join(f"oifname {interface(self.policy.loopback)}", query)
            rules.append(Rule(match, f"snat {ip} to {local}", "d5: a redirected query comes from the local address"))
        return Chain(DNS_SOURCE, tuple(rules), Hook("nat", "postrouting", SOURCE))

    def _own_listeners(self, family: Family) -> Iterator[str]:
        """Matches for what this host's own connections are redirected to."""
        if self.policy.outbound.enabled:
            yield f"tcp dport {self.policy.outbound.port}"
        if self.policy.captures_dns(family):
            yield f"udp dport {self.policy.dns.port}"
            if self.policy.dns.tcp:
                yield f"tcp dport {self.policy.dns.port}"

    def _log(self, prefix: str, families: tuple[Family, ...]) -> Iterator[Rule]:
        if self.policy.log_level is not None and families:
            level = LOG_LEVELS[self.policy.log_level]
            yield Rule(self.guard(families), f'log prefix "{prefix}" level {level}', "log")

    # -- chains that are jumped to -----------------------------------------------------------------------------------

    def _called(self) -> Iterator[Chain]:
        if not self.families:
            return
        yield Chain("inbound", tuple(self._inbound("goto inbound_listener")))
        yield Chain("inbound_listener", tuple(self._to_inbound_listener()))
        yield from tproxy.called_chains(self, self._inbound(f"goto {tproxy.HAND_OVER}"))
        if self.capturing:
            yield Chain("dns", tuple(self._dns()))
            yield Chain("dns_tcp", tuple(self._dns_over_tcp()))
        yield Chain("outbound", tuple(self._outbound()))

    def _inbound(self, to_listener: str) -> Iterator[Rule]:
        """Passes with `return`, because self-calls of the data plane (o3) go on behind their jump."""
        inbound = self.policy.inbound
        if not inbound.enabled:
            yield Rule("", "return", "i3: inbound redirection is off")
            return
        for match in self.networks("excluded_sources", inbound.exclude_sources, "saddr"):
            yield Rule(match, "return", "i4: excluded sources")
        if inbound.include_ports:
            yield Rule(self.ports("included_inbound_ports", inbound.include_ports), to_listener, "i5: included ports")
            return
        if inbound.exclude_ports:
            yield Rule(self.ports("excluded_inbound_ports", inbound.exclude_ports), "return", "i6: excluded ports")
        yield Rule(TCP, to_listener, "i7: everything else")

    def _to_inbound_listener(self) -> Iterator[Rule]:
        """Keeps the address, which REDIRECT does not: what arrives by an interface without one would be dropped."""
        for family in self.families:
            action = translate_to(family, self.policy.inbound.port)
            yield Rule(join(self.nfproto(family), TCP), action, "to the inbound listener")

    def _outbound(self) -> Iterator[Rule]:
        outbound = self.policy.outbound
        if Family.IPV6 in self.families:
            yield Rule(f"ip6 daddr {LINK_LOCAL6}", "accept", "s1: link-local destinations cannot be redirected")
        yield from self._excluded_departures()
        yield from self._excluded_uids(Protocol.TCP)
        for match in self.excluded_destinations():
            yield Rule(match, "accept", "x2: excluded destinations")
        if self.capturing:
            # Its first rule sends the data plane's packets back: `skuid !=` would miss packets without an owner.
            query = join(self.guard(self.capturing), f"tcp dport {DNS_PORT}")
            yield Rule(query, "jump dns_tcp", "DNS over TCP")
        if not outbound.enabled:
            yield Rule("", "accept", "o0: outbound redirection is off")
            return
        if outbound.exclude_ports and not outbound.include_ports:
            yield Rule(self.ports("excluded_outbound_ports", outbound.exclude_ports), "accept", "o1: excluded ports")
        yield from self._outbound_by_owner()
        to_listener = redirect_to(outbound.port)
        if outbound.include_ports:
            included = self.ports("included_outbound_ports", outbound.include_ports)
            yield Rule(included, to_listener, "o7: included ports")
        else:
            yield Rule(TCP, to_listener, "o7: everything else")

    def _excluded_departures(self) -> Iterator[Rule]:
        return (Rule(match, "accept", text) for match, text in self.excluded_departures())

    def _outbound_by_owner(self) -> Iterator[Rule]:
        loopback = f"oifname {interface(self.policy.loopback)}"
        for family in self.families:
            passthrough = f"{ADDRESS[family]} saddr {RESERVED[family].passthrough.network_address}"
            yield Rule(join(loopback, passthrough), "accept", "o2: the data plane reaches the application")
        if self.policy.inbound.is_transparent:
            from_client = join(self.guard(), tproxy.from_client(self))
            yield Rule(from_client, "accept", "t1: the data plane reaches the application from the client's address")
        for family in self.families:
            elsewhere = f"{ADDRESS[family]} daddr != {RESERVED[family].local.network_address}"
            text = "o3: the data plane calls this host's own address"
            yield Rule(join(loopback, elsewhere, self.owner), "jump inbound", text)
        # o5 before o4: with the data plane's packets gone, "not owned by it" needs no `skuid !=`.
        yield Rule(self.owner, "accept", "o5: the data plane's own connections")
        yield Rule(loopback, "accept", "o4: applications that talk to this host")
        for family in self.families:
            local = f"{ADDRESS[family]} daddr {RESERVED[family].local.network_address}"
            yield Rule(local, "accept", "o6: this host")

    def _dns_over_tcp(self) -> Iterator[Rule]:
        yield Rule(self.owner, "return", "the data plane's own queries go on like its other connections")
        if self.policy.dns.tcp:
            for match in self.servers(self.capturing, "daddr"):
                yield Rule(join(match, TCP), redirect_to(self.policy.dns.port), "d4: DNS over TCP")
        yield Rule("", "accept", "x4: DNS over TCP passes")

    def _dns(self) -> Iterator[Rule]:
        yield from self._excluded_departures()
        for match in self.dns_excluded_uids():
            yield Rule(match, "accept", "x1: excluded uids")
        for match in self.excluded_destinations():
            yield Rule(match, "accept", "x2: excluded destinations")
        yield Rule(self.owner, "accept", "d2: the data plane asks its name server")
        for match in self.servers(self.capturing, "daddr"):
            yield Rule(join(match, "meta l4proto udp"), redirect_to(self.policy.dns.port), "d3: to the DNS listener")

    def _excluded_uids(self, protocol: Protocol) -> Iterator[Rule]:
        """One rule for all users that share their excluded ports, and one for the pairs of user and port of the others.

        A verdict map would do with one lookup, but the kernel empties a map that is deleted for packets that are still
        under way in the old rules, and an excluded user's connection was redirected in one of fifty swaps under load.
        """
        shared, pairs = uids_and_ports(self.policy.outbound.exclude_uids, protocol)
        for number, (ports, uids) in enumerate(shared.items()):
            name = f"excluded_uids_{number}"
            owner = f"meta skuid {self.one_or_set(name, 'uid', uids)}"
            given = () if ports == (ALL_PORTS,) else ports
            match = f"tcp dport {self.one_or_set(f'{name}_ports', 'inet_service', given)}" if given else ""
            yield Rule(join(owner, match), "accept", f"x1: excluded uids {_shortened(uids)}")
        if pairs:
            elements = (f"{uid}{AND}{port}" for uid, port in pairs)
            match = f"meta skuid . tcp dport {self.define('excluded_uids_ports', UID_AND_PORT, elements)}"
            uids = tuple(dict.fromkeys(uid for uid, _ in pairs))
            yield Rule(match, "accept", f"x1: excluded uids {_shortened(uids)}")


def _shortened(items: tuple[object, ...]) -> str:
    shown = ", ".join(map(str, items[:3]))
    return f"{shown}, ..." if len(items) > 3 else shown
