"""From a policy to the one table of the nftables engine. Pure.

Four things of nf_tables shape it (docs/ruleset.md):

- Chains of other tables at the same hook are asked whatever ours say, until one of them sets an address. `accept` ends
  only our own base chain; so an exclusion never keeps other software's rules from being asked.
- Of two chains of equal priority at a hook the one registered last runs first. So ours never stand at the -100 that
  everybody uses: "after the rules of others" is -99 and "before them" -101.
- `meta skuid != U` does not match packets without an owner. Where the specification says "not owned by U", U's packets
  are sent past the rule first.
- The first `ct zone set` a packet meets counts; later ones are without effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.decide import CAPTURED_ZONE, UPSTREAM_ZONE
from agent.engines.nftables.intervals import merged_networks, merged_ports, merged_uids, ports_by_uids
from agent.engines.nftables.table import Chain, Hook, Rule, Set, Table
from agent.errors import InputError
from agent.policy import (
    ALL_PORTS,
    DNS_PORT,
    LINK_LOCAL6,
    RESERVED,
    DnsCapture,
    Family,
    Network,
    Policy,
    Ports,
    Protocol,
    UidExclusion,
    VirtualNetwork,
    includes,
)

RAW = -300
"""Before conntrack (-200), which looks at the zone."""
MANGLE = -150
FIRST = -101
LAST = -99

SYN = "tcp flags & (fin | syn | rst | ack) == syn"
"""Only a connection's first segment is redirected: on a host whose conntrack was idle, running connections look new."""
TCP = "meta l4proto tcp"
QUERY = f"udp dport {DNS_PORT}"
ADDRESS = {Family.IPV4: "ip", Family.IPV6: "ip6"}
LOG_LEVELS = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")


def table_for(policy: Policy) -> Table:
    """The table that makes the kernel agree with `decide()`. Raises InputError for an interface nft cannot name."""
    return _Builder(policy).table()


def interface(name: str) -> str:
    """An interface pattern of iptables(8) (`br+`) in nft's language; empty when it means every interface."""
    if name == "+":
        return ""
    if '"' in name or "\\" in name or "\n" in name:
        raise InputError(f"the interface {name!r} has a character that nft cannot read")
    if name.endswith("+"):
        return f'"{name[:-1]}*"'
    # Only a last asterisk is a wildcard to nft, and a backslash takes that away.
    return f'"{name[:-1]}\\*"' if name.endswith("*") else f'"{name}"'


class _Builder:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.families = tuple(sorted(policy.families))
        self.sets: dict[str, Set] = {}
        self.owner = f"meta skuid {policy.proxy_uid}"

    def table(self) -> Table:
        chains = (*self._zones(), *self._invalid(), *self._prerouting(), *self._output(), *self._called())
        # A base chain costs every packet a call, even an empty one.
        chains = tuple(chain for chain in chains if chain.rules or chain.hook is None)
        return Table(tuple(self.sets.values()), chains)

    # -- conntrack zones ---------------------------------------------------------------------------------------------

    def _zones(self) -> Iterator[Chain]:
        yield Chain("zone_prerouting", tuple(self._zone_prerouting()), Hook("filter", "prerouting", RAW))
        yield Chain("zone_output", tuple(self._zone_output()), Hook("filter", "output", RAW))
        if self._splitting:
            yield Chain("zone_query", tuple(self._zone_query()))

    @property
    def _splitting(self) -> tuple[Family, ...]:
        return tuple(family for family in self.families if self.policy.splits_zones(family))

    def _zone_prerouting(self) -> Iterator[Rule]:
        for family in self._splitting:
            for vnet in self.policy.networks(family):
                match = _join(self._nfproto(family), _in(vnet), QUERY)
                yield _zone(match, CAPTURED_ZONE, f"z6: a query from {vnet.interface}")
        forwarded = f"{QUERY} fib daddr type != local"
        for match in self._servers(self._splitting, "daddr"):
            yield _zone(_join(match, forwarded), UPSTREAM_ZONE, "z7: a forwarded query")
        for match in self._servers(self._splitting, "saddr"):
            yield _zone(_join(match, f"udp sport {DNS_PORT}"), UPSTREAM_ZONE, "z4: an answer")

    def _zone_output(self) -> Iterator[Rule]:
        for match in self._servers(self._splitting, "daddr"):
            yield Rule(_join(match, QUERY), "jump zone_query", "a query to a captured server")
        if not self._splitting:
            return
        answer = _join(self._guard(self._splitting), f"udp sport {self.policy.dns.port}", self.owner)
        yield _zone(answer, CAPTURED_ZONE, "z2: the data plane answers an application")
        if self.policy.dns.capture is not DnsCapture.LISTED:
            return
        for family in self._splitting:
            ip = ADDRESS[family]
            for server in self.policy.servers(family):
                if server.address.is_loopback:
                    local = RESERVED[family].local.network_address
                    match = f"{ip} saddr {server.address} {ip} daddr {local} meta l4proto udp"
                    yield _zone(match, UPSTREAM_ZONE, f"z3: the local resolver {server} answers the data plane")

    def _zone_query(self) -> Iterator[Rule]:
        yield _zone(self.owner, UPSTREAM_ZONE, "z1: the data plane asks its name server")
        for match in self._dns_excluded_uids():
            yield _zone(match, UPSTREAM_ZONE, "z5: excluded uids")
        for match in self._excluded_destinations():
            yield _zone(match, UPSTREAM_ZONE, "z5: excluded destinations")
        yield _zone("", CAPTURED_ZONE, "z3: a query that is redirected")

    # -- base chains -------------------------------------------------------------------------------------------------

    def _invalid(self) -> Iterator[Chain]:
        if self.policy.drop_invalid and self.families:
            rule = Rule(_join(self._guard(), "ct state invalid"), "drop", "i1: invalid packets are dropped")
            yield Chain("drop_invalid", (rule,), Hook("filter", "prerouting", MANGLE))

    def _prerouting(self) -> Iterator[Chain]:
        """A family with virtual networks goes before the rules of others, as with iptables.

        What goes before is asked once more after them: otherwise a packet that is between the two chains while one
        policy replaces another could pass the first before it has the rules and the second when it has them no more.
        """
        policy = self.policy
        first = tuple(family for family in self.families if policy.inbound.insert or policy.networks(family))
        last = tuple(family for family in self.families if family not in first)
        rules = [*self._log("PREROUTING:", first)]
        for family in first:
            for vnet in policy.networks(family):
                rules += self._virtual_network(family, vnet)
        yield Chain("prerouting_first", (*rules, *self._arriving(first)), Hook("nat", "prerouting", FIRST))
        rules = [*self._log("PREROUTING:", last), *self._arriving(self.families)]
        yield Chain("prerouting_last", tuple(rules), Hook("nat", "prerouting", LAST))

    def _arriving(self, families: tuple[Family, ...]) -> Iterator[Rule]:
        if families:
            local = _join(self._guard(families), SYN, "fib daddr type local")
            yield Rule(local, "jump inbound", "i0: new connections to this host")

    def _virtual_network(self, family: Family, vnet: VirtualNetwork) -> Iterator[Rule]:
        dns, outbound = self.policy.dns, self.policy.outbound
        carried = _join(self._nfproto(family), _in(vnet))
        yield Rule(_join(carried, QUERY), _redirect(dns.port), f"v1: DNS from {vnet.interface}")
        if dns.tcp:
            query = _join(carried, SYN, f"tcp dport {DNS_PORT}")
            yield Rule(query, _redirect(dns.port), f"v3: DNS over TCP from {vnet.interface}")
        if vnet.network.prefixlen:
            elsewhere = f"{ADDRESS[family]} daddr != {vnet.network}"
            yield Rule(_join(carried, elsewhere, SYN), _redirect(outbound.port), f"i2: leaves {vnet}")

    def _output(self) -> Iterator[Chain]:
        """As with the connections that arrive, what goes before the rules of others is asked after them as well."""
        outbound = Rule(_join(self._guard(), SYN), "jump outbound", "new connections of this host")
        jump = (outbound,) if self.families else ()
        first = [*self._log("OUTPUT:", self.families)]
        if self._capturing:
            first.append(Rule(_join(self._guard(self._capturing), QUERY), "jump dns", "DNS queries"))
        insert = self.policy.outbound.insert
        yield Chain("output_first", (*first, *(jump if insert else ())), Hook("nat", "output", FIRST))
        yield Chain("output_last", jump, Hook("nat", "output", LAST))

    def _log(self, prefix: str, families: tuple[Family, ...]) -> Iterator[Rule]:
        if self.policy.log_level is not None and families:
            level = LOG_LEVELS[self.policy.log_level]
            yield Rule(self._guard(families), f'log prefix "{prefix}" level {level}', "log")

    # -- chains that are jumped to -----------------------------------------------------------------------------------

    def _called(self) -> Iterator[Chain]:
        if not self.families:
            return
        yield Chain("inbound", tuple(self._inbound()))
        yield from self._excluded_uid_chains(Protocol.TCP)
        if self._capturing:
            yield Chain("dns", tuple(self._dns()))
            yield Chain("dns_tcp", tuple(self._dns_over_tcp()))
        yield Chain("outbound", tuple(self._outbound()))

    @property
    def _capturing(self) -> tuple[Family, ...]:
        return tuple(family for family in self.families if self.policy.captures_dns(family))

    def _inbound(self) -> Iterator[Rule]:
        """Passes with `return`, because self-calls of the data plane (o3) go on behind their jump."""
        inbound = self.policy.inbound
        if not inbound.enabled:
            yield Rule("", "return", "i3: inbound redirection is off")
            return
        for match in self._networks("excluded_sources", inbound.exclude_sources, "saddr"):
            yield Rule(match, "return", "i4: excluded sources")
        to_listener = _redirect(inbound.port)
        if inbound.include_ports:
            yield Rule(self._ports("included_inbound_ports", inbound.include_ports), to_listener, "i5: included ports")
            return
        if inbound.exclude_ports:
            yield Rule(self._ports("excluded_inbound_ports", inbound.exclude_ports), "return", "i6: excluded ports")
        yield Rule(TCP, to_listener, "i7: everything else")

    def _outbound(self) -> Iterator[Rule]:
        outbound = self.policy.outbound
        if Family.IPV6 in self.families:
            yield Rule(f"ip6 daddr {LINK_LOCAL6}", "accept", "s1: link-local destinations cannot be redirected")
        if any(item.protocol is Protocol.TCP for item in outbound.exclude_uids):
            yield Rule("", "meta skuid vmap @excluded_uids", "x1: excluded uids")
        for match in self._excluded_destinations():
            yield Rule(match, "accept", "x2: excluded destinations")
        if self._capturing:
            # Its first rule sends the data plane's packets back: `skuid !=` would miss packets without an owner.
            query = _join(self._guard(self._capturing), f"tcp dport {DNS_PORT}")
            yield Rule(query, "jump dns_tcp", "DNS over TCP")
        if not outbound.enabled:
            yield Rule("", "accept", "o0: outbound redirection is off")
            return
        if outbound.exclude_ports and not outbound.include_ports:
            yield Rule(self._ports("excluded_outbound_ports", outbound.exclude_ports), "accept", "o1: excluded ports")
        yield from self._outbound_by_owner()
        to_listener = _redirect(outbound.port)
        if outbound.include_ports:
            included = self._ports("included_outbound_ports", outbound.include_ports)
            yield Rule(included, to_listener, "o7: included ports")
        else:
            yield Rule(TCP, to_listener, "o7: everything else")

    def _outbound_by_owner(self) -> Iterator[Rule]:
        loopback = f"oifname {interface(self.policy.loopback)}"
        for family in self.families:
            passthrough = f"{ADDRESS[family]} saddr {RESERVED[family].passthrough.network_address}"
            yield Rule(_join(loopback, passthrough), "accept", "o2: the data plane reaches the application")
        for family in self.families:
            elsewhere = f"{ADDRESS[family]} daddr != {RESERVED[family].local.network_address}"
            text = "o3: the data plane calls this host's own address"
            yield Rule(_join(loopback, elsewhere, self.owner), "jump inbound", text)
        # o5 before o4: with the data plane's packets gone, "not owned by it" needs no `skuid !=`.
        yield Rule(self.owner, "accept", "o5: the data plane's own connections")
        yield Rule(loopback, "accept", "o4: applications that talk to this host")
        for family in self.families:
            local = f"{ADDRESS[family]} daddr {RESERVED[family].local.network_address}"
            yield Rule(local, "accept", "o6: this host")

    def _dns_over_tcp(self) -> Iterator[Rule]:
        yield Rule(self.owner, "return", "the data plane's own queries go on like its other connections")
        if self.policy.dns.tcp:
            for match in self._servers(self._capturing, "daddr"):
                yield Rule(_join(match, TCP), _redirect(self.policy.dns.port), "d4: DNS over TCP")
        yield Rule("", "accept", "x4: DNS over TCP passes")

    def _dns(self) -> Iterator[Rule]:
        for match in self._dns_excluded_uids():
            yield Rule(match, "accept", "x1: excluded uids")
        for match in self._excluded_destinations():
            yield Rule(match, "accept", "x2: excluded destinations")
        yield Rule(self.owner, "accept", "d2: the data plane asks its name server")
        for match in self._servers(self._capturing, "daddr"):
            yield Rule(_join(match, "meta l4proto udp"), _redirect(self.policy.dns.port), "d3: to the DNS listener")

    def _excluded_uid_chains(self, protocol: Protocol) -> Iterator[Chain]:
        """One lookup finds the chain of a uid, one more its ports."""
        targets: list[str] = []
        for number, (ports, uids) in enumerate(ports_by_uids(self.policy.outbound.exclude_uids, protocol).items()):
            name = f"excluded_uids_{number}"
            match = "" if ports == (ALL_PORTS,) else self._ports(f"{name}_ports", ports)
            yield Chain(name, (Rule(match, "accept", f"x1: excluded uids {_shortened(uids)}"),))
            targets += [f"{item} : jump {name}" for item in uids]
        if targets:
            self._set("excluded_uids", "uid : verdict", targets)

    # -- parts of rules ----------------------------------------------------------------------------------------------

    def _guard(self, families: Iterable[Family] | None = None) -> str:
        """Keeps a rule to some families; a family the policy leaves alone is never touched."""
        chosen = self.families if families is None else tuple(families)
        return "" if len(chosen) == len(Family) else self._nfproto(chosen[0])

    def _nfproto(self, family: Family) -> str:
        return f"meta nfproto ipv{family.value}"

    def _servers(self, families: tuple[Family, ...], side: str) -> Iterator[str]:
        """Matches that together cover the captured servers, as source or destination (`side`)."""
        for family in families:
            ip = ADDRESS[family]
            if self.policy.dns.capture is DnsCapture.LISTED:
                servers = tuple(dict.fromkeys(str(server.address) for server in self.policy.servers(family)))
                yield f"{ip} {side} {self._set(f'name_servers_v{family.value}', _type(family), servers)}"
            elif family is Family.IPV6:
                yield f"{ip} {side} != {LINK_LOCAL6}"  # s1
            else:
                yield self._nfproto(family)

    def _excluded_destinations(self) -> Iterator[str]:
        return self._networks("excluded_destinations", self.policy.outbound.exclude_destinations, "daddr")

    def _networks(self, name: str, networks: Iterable[Network], side: str) -> Iterator[str]:
        wanted = tuple(networks)
        for family in self.families:
            merged = merged_networks(wanted, family)
            if merged:
                elements = self._set(f"{name}_v{family.value}", _type(family), map(str, merged))
                yield f"{ADDRESS[family]} {side} {elements}"

    def _ports(self, name: str, ports: Ports) -> str:
        return f"tcp dport {self._set(name, 'inet_service', map(str, merged_ports(ports)))}"

    def _dns_excluded_uids(self) -> Iterator[str]:
        uids = merged_uids(item.uids for item in self.policy.outbound.exclude_uids if _covers_dns(item))
        if uids:
            yield f"meta skuid {self._set('dns_excluded_uids', 'uid', map(str, uids))}"

    def _set(self, name: str, kind: str, elements: Iterable[str]) -> str:
        self.sets[name] = Set(name, kind, tuple(elements))
        return f"@{name}"


def _covers_dns(item: UidExclusion) -> bool:
    return item.protocol is Protocol.UDP and includes(item.ports, DNS_PORT)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _zone(match: str, zone: int, comment: str) -> Rule:
    return Rule(match, f"ct zone set {zone} accept", comment)


def _redirect(port: int) -> str:
    return f"redirect to :{port}"


def _in(vnet: VirtualNetwork) -> str:
    name = interface(vnet.interface)
    return f"iifname {name}" if name else ""


def _type(family: Family) -> str:
    return f"ipv{family.value}_addr"


def _shortened(items: tuple[object, ...]) -> str:
    shown = ", ".join(map(str, items[:3]))
    return f"{shown}, ..." if len(items) > 3 else shown
