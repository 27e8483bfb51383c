"""The conntrack zones of DNS traffic; `tpctl.spec.decide.zone` says why there are any. Pure.

The first `ct zone set` a packet meets counts; so each rule that sets one ends the chain, too.
"""

from __future__ import annotations

from collections.abc import Iterator

from tpctl.engines.nftables.parts import ADDRESS, QUERY, Parts, interface, join
from tpctl.engines.nftables.table import Chain, Hook, Rule
from tpctl.spec.policy import DNS_PORT, RESERVED, DnsCapture
from tpctl.spec.zones import CAPTURED_ZONE, UPSTREAM_ZONE

RAW = -300
"""Before conntrack (-200), which looks at the zone."""


def zone_chains(parts: Parts) -> Iterator[Chain]:
    """The chains that choose zones; nothing but empty ones when the policy does without."""
    yield Chain("zone_prerouting", tuple(_zone_prerouting(parts)), Hook("filter", "prerouting", RAW))
    yield Chain("zone_output", tuple(_zone_output(parts)), Hook("filter", "output", RAW))
    if parts.splitting:
        yield Chain("zone_query", tuple(_zone_query(parts)))


def _zone_prerouting(parts: Parts) -> Iterator[Rule]:
    if parts.splitting:
        yield from parts.from_outside()
    for family in parts.splitting:
        for vnet in parts.policy.networks(family):
            match = join(parts.nfproto(family), parts.carried_by(vnet), QUERY)
            yield _zone(match, CAPTURED_ZONE, f"z6: a query from {vnet.interface}")
    forwarded = f"{QUERY} fib daddr type != local"
    for match in parts.servers(parts.splitting, "daddr"):
        yield _zone(join(match, forwarded), UPSTREAM_ZONE, "z7: a forwarded query")
    for match in parts.servers(parts.splitting, "saddr"):
        yield _zone(join(match, f"udp sport {DNS_PORT}"), UPSTREAM_ZONE, "z4: an answer")


def _zone_output(parts: Parts) -> Iterator[Rule]:
    for match in parts.servers(parts.splitting, "daddr"):
        yield Rule(join(match, QUERY), "jump zone_query", "a query to a captured server")
    if not parts.splitting:
        return
    answer = join(parts.guard(parts.splitting), f"udp sport {parts.policy.dns.port}", parts.owner)
    yield _zone(answer, CAPTURED_ZONE, "z2: the data plane answers an application")
    if parts.policy.dns.port != DNS_PORT:
        own = f"oifname {interface(parts.policy.loopback)} udp dport {parts.policy.dns.port}"
        yield _zone(join(parts.guard(parts.splitting), own), CAPTURED_ZONE, "z8: a query to the listener itself")
    if parts.policy.dns.capture is not DnsCapture.LISTED:
        return
    for family in parts.splitting:
        ip = ADDRESS[family]
        for server in parts.policy.servers(family):
            if server.address.is_loopback:
                local = RESERVED[family].local.network_address
                match = f"{ip} saddr {server.address} {ip} daddr {local} meta l4proto udp"
                yield _zone(match, UPSTREAM_ZONE, f"z3: the local resolver {server} answers the data plane")


def _zone_query(parts: Parts) -> Iterator[Rule]:
    yield _zone(parts.owner, UPSTREAM_ZONE, "z1: the data plane asks its name server")
    for match, text in parts.excluded_departures():
        yield _zone(match, UPSTREAM_ZONE, f"z5, {text}")
    for match in parts.dns_excluded_uids():
        yield _zone(match, UPSTREAM_ZONE, "z5: excluded uids")
    for match in parts.excluded_destinations():
        yield _zone(match, UPSTREAM_ZONE, "z5: excluded destinations")
    yield _zone(parts.inside, CAPTURED_ZONE, "z3: a query that is redirected")
    if parts.policy.cgroup:
        yield _zone("", UPSTREAM_ZONE, f"z5: outside the cgroup {parts.policy.cgroup}")


def _zone(match: str, zone: int, comment: str) -> Rule:
    return Rule(match, f"ct zone set {zone} accept", comment)
