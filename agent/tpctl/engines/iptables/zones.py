"""The rules of the table raw: DNS flows are put into conntrack zones (`tpctl.spec.decide.zone` says which and why)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpctl.engines.iptables.parts import Jump, Parts, TableRules, address, comment, dport, owned_by, within
from tpctl.engines.iptables.rule import Criterion, Option, Rule, match
from tpctl.spec.policy import (
    DNS_PORT,
    LINK_LOCAL6,
    DnsCapture,
    Family,
    Protocol,
)
from tpctl.spec.zones import CAPTURED_ZONE, UPSTREAM_ZONE

ZONE_INBOUND = "TPCTL_ZONE_PREROUTING"
ZONE_OUTBOUND = "TPCTL_ZONE_OUTPUT"
ZONE_QUERY = "TPCTL_ZONE_QUERY"
ZONE_VIRTUAL_NETWORKS = "TPCTL_ZONE_VNET"


class ZoneRules(Parts):
    """The table raw of one family."""

    def raw(self) -> TableRules:
        """The table; empty when zones are not split."""
        if not self.policy.splits_zones(self.family):
            return TableRules("raw")
        chains: tuple[tuple[str, tuple[Rule, ...]], ...] = (
            (ZONE_INBOUND, tuple(self._zone_inbound())),
            (ZONE_OUTBOUND, tuple(self._zone_outbound())),
            (ZONE_QUERY, tuple(self._zone_query())),
        )
        if self._is_divided():
            chains += ((ZONE_VIRTUAL_NETWORKS, (*self.excluded_members(), *self._zone_virtual_networks())),)
        jumps = tuple(
            Jump(chain, Rule(own, protocol="udp", comment=comment("conntrack zones of DNS")))
            for chain, own in (("PREROUTING", ZONE_INBOUND), ("OUTPUT", ZONE_OUTBOUND))
        )
        return TableRules("raw", chains, jumps)

    def _zone_rule(self, zone: int, text: str, **criteria: Any) -> Rule:
        options = (Option("zone", (str(zone),)),)
        return Rule("CT", protocol="udp", target_options=options, comment=comment(text), **criteria)

    def _zone_inbound(self) -> Iterator[Rule]:
        query = (dport(Protocol.UDP, DNS_PORT),)
        answer = (match("udp", ("sport", str(DNS_PORT))),)
        yield from self.from_outside()
        if self._is_divided():
            text = comment("queries of virtual networks")
            yield Rule(ZONE_VIRTUAL_NETWORKS, protocol="udp", matches=query, comment=text)
        else:
            yield from self._zone_virtual_networks()
        forwarded = (*query, match("addrtype", Option("dst-type", ("LOCAL",), negated=True)))
        if self.policy.dns.capture is DnsCapture.ALL:
            yield self._zone_rule(UPSTREAM_ZONE, "z7: a forwarded query", matches=forwarded)
            if self.family is Family.IPV6:
                yield self.leave("z4: not of a link-local server", source=address(LINK_LOCAL6))
            yield self._zone_rule(UPSTREAM_ZONE, "z4: an answer", matches=answer)
            return
        for server in self.policy.servers(self.family):
            here = self.host(server)
            text = f"z7: a forwarded query to {server}"
            yield self._zone_rule(UPSTREAM_ZONE, text, destination=here, matches=forwarded)
            yield self._zone_rule(UPSTREAM_ZONE, f"z4: an answer of {server}", source=here, matches=answer)

    def _is_divided(self) -> bool:
        """Whether some interfaces of a virtual network are excluded. z7 and z4 hold for those all the same."""
        return any(self.excluded_members())

    def _zone_virtual_networks(self) -> Iterator[Rule]:
        for vnet in self.policy.networks(self.family):
            yield self._zone_rule(
                CAPTURED_ZONE,
                f"z6: a query from {vnet.interface}",
                in_interface=Criterion(vnet.interface),
                matches=(dport(Protocol.UDP, DNS_PORT),),
            )

    def _zone_outbound(self) -> Iterator[Rule]:
        query = (dport(Protocol.UDP, DNS_PORT),)
        for criteria in self.captured_servers():
            yield Rule(
                ZONE_QUERY, protocol="udp", matches=query, comment=comment("a query to a captured server"), **criteria
            )
        answer = match("udp", ("sport", str(self.policy.dns.port)))
        text = "z2: the data plane answers an application"
        yield self._zone_rule(CAPTURED_ZONE, text, matches=(answer, owned_by(self.policy.proxy_uid)))
        if self.policy.dns.port != DNS_PORT:
            yield self._zone_rule(
                CAPTURED_ZONE,
                "z8: a query to the listener itself",
                out_interface=Criterion(self.policy.loopback),
                matches=(dport(Protocol.UDP, self.policy.dns.port),),
            )
        for server in self.policy.servers(self.family):
            if self.policy.dns.capture is DnsCapture.LISTED and server.address.is_loopback:
                yield self._zone_rule(
                    UPSTREAM_ZONE,
                    f"z3: the local resolver {server} answers the data plane",
                    source=self.host(server),
                    destination=address(self.reserved.local),
                )

    def _zone_query(self) -> Iterator[Rule]:
        yield from self.scoped_destinations()
        text = "z1: the data plane asks its name server"
        yield self._zone_rule(UPSTREAM_ZONE, text, matches=(owned_by(self.policy.proxy_uid),))
        for text, criteria in self.excluded_departures():
            yield self._zone_rule(UPSTREAM_ZONE, f"z5, {text}", **criteria)
        for uids in self.dns_excluded_uids():
            yield self._zone_rule(UPSTREAM_ZONE, f"z5: excluded uids {uids}", matches=(owned_by(uids),))
        for network in self.excluded_destinations():
            yield self._zone_rule(UPSTREAM_ZONE, "z5: excluded destination", destination=within(network))
        yield self._zone_rule(CAPTURED_ZONE, "z3: a query that is redirected", matches=self.inside())
        if self.policy.cgroup:
            yield self._zone_rule(UPSTREAM_ZONE, f"z5: outside the cgroup {self.policy.cgroup}")
