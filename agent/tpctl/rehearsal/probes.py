"""The connections worth trying for a policy: every rule it has, its edges, and what it must leave alone. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from tpctl.engines.base import ROUTE_MARK
from tpctl.rehearsal.cast import Cast, Probe, cast_for, sample
from tpctl.rehearsal.cgroup import BELOW
from tpctl.rehearsal.choices import can_answer_clients, data_plane_ports
from tpctl.rehearsal.layout import HOST_LINK_LOCAL, PEER, PEER_LINK_LOCAL, Bridge, Layout, member
from tpctl.rehearsal.own_ports import own_ports
from tpctl.spec.decide import decide
from tpctl.spec.exclusions import MAX_MARK
from tpctl.spec.policy import (
    DNS_PORT,
    MAX_PORT,
    MAX_UID,
    RESERVED,
    Address,
    Family,
    Network,
    Policy,
    PortRange,
    Ports,
    Protocol,
    UidExclusion,
    includes,
    of_family,
)
from tpctl.spec.ssh_guard import SSH_PORT
from tpctl.spec.verdict import Action

ROOT = 0
_BESIDE_LINK_LOCAL = ip_address("fec0::10")
_REUSED_PORT = 19053
"""A source port that a query of the data plane and one of an application share; no dial gets it otherwise."""
_MOST_RANGES = 16
"""A policy with more port ranges, networks or users is sampled: the first so many are tried."""


def probes(policy: Policy, layout: Layout) -> list[Probe]:
    """The probes of a staged policy, in an order a reader can follow; a family that is not redirected is tried too."""
    found: list[Probe] = []
    for family in sorted(layout.families):
        cast = cast_for(policy, layout, family)
        for part in (_inbound, _outbound, _marked, _to_self, own_ports, _dns, _other_groups, _bridges):
            found += part(cast)
    return found


def _edges(policy: Policy, ranges: Ports) -> Iterator[int]:
    """The first and last port of each range and their neighbours, once each."""
    taken = data_plane_ports(policy) | {DNS_PORT}
    for item in ranges[:_MOST_RANGES]:
        for port in (item.first, item.last, item.first - 1, item.last + 1):
            if 1 <= port <= MAX_PORT and port not in taken:
                taken |= {port}
                yield port


def _named(ranges: Iterable[PortRange], port: int, what: str) -> str:
    return f"{what} port {port}" if includes(ranges, port) else f"port {port}, next to {what} ones"


def _rim(cast: Cast, network: Network) -> Iterator[tuple[str, Address]]:
    """Addresses of the peer in a network, at its end, and on either side of it, each with what it is."""
    first, last = int(network.network_address), int(network.broadcast_address)
    candidates = [(f"the excluded {network}", sample(network)), (f"the end of the excluded {network}", network[-1])]
    kind = type(network.network_address)
    if first > 0:
        candidates.append((f"the address below the excluded {network}", kind(first - 1)))
    if last < 2**network.max_prefixlen - 1:
        candidates.append((f"the address above the excluded {network}", kind(last + 1)))
    for address, label in {address: label for label, address in reversed(candidates)}.items():
        special = address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local
        reserved = address.version == 4 and (address.is_reserved or int(address) >> 24 == 0)
        if not (special or reserved) and cast.layout.locate(address) == PEER:
            yield label, address


def _inbound(cast: Cast) -> Iterator[Probe]:
    inbound = cast.policy.inbound
    yield cast.arrive("inbound", cast.port_in)
    yield cast.arrive("inbound ssh", SSH_PORT)
    if cast.family is Family.IPV6:
        yield cast.arrive(
            "inbound between link-local addresses", cast.port_in, source=PEER_LINK_LOCAL, to=HOST_LINK_LOCAL
        )
    for what, ranges in (("included", inbound.include_ports), ("excluded", inbound.exclude_ports)):
        for port in _edges(cast.policy, ranges):
            yield cast.arrive(f"inbound, {_named(ranges, port, what)}", port)
    for source in tuple(of_family(inbound.exclude_sources, cast.family))[:_MOST_RANGES]:
        for label, address in _rim(cast, source):
            yield cast.arrive(f"inbound from {label}", cast.port_in, source=address)
    yield from _from_outside(cast, "", cast.remote)
    yield cast.arrive("inbound UDP", cast.port_in, protocol=Protocol.UDP)
    for protocol in Protocol:
        yield cast.arrive(f"inbound DNS over {protocol.upper()}", DNS_PORT, protocol=protocol)


def _from_outside(cast: Cast, who: str, source: Address) -> Iterator[Probe]:
    """To addresses of this host that nobody else may reach. IPv6 has none that get as far as the rules."""
    if cast.family is Family.IPV4:
        for to in ("127.0.0.1", "127.200.0.1"):
            yield cast.arrive(f"{who}inbound to {to}", cast.port_in, source=source, to=ip_address(to))


def _outbound(cast: Cast) -> Iterator[Probe]:
    outbound = cast.policy.outbound
    yield cast.out("outbound by an application", cast.port_out)
    yield cast.out("outbound by root", cast.port_out, uid=ROOT)
    for port in sorted({cast.port_out, cast.port_in}):
        yield cast.out(f"outbound by the data plane to port {port}", port, uid=cast.policy.proxy_uid)
    for what, ranges in (("included", outbound.include_ports), ("excluded", outbound.exclude_ports)):
        for port in _edges(cast.policy, ranges):
            yield cast.out(f"outbound, {_named(ranges, port, what)}", port)
    for network in tuple(of_family(outbound.exclude_destinations, cast.family))[:_MOST_RANGES]:
        for label, address in _rim(cast, network):
            yield cast.out(f"outbound to {label}", cast.port_out, to=address)
            if cast.policy.captures_dns(cast.family):
                for protocol in Protocol:
                    yield cast.query(f"DNS over {protocol.upper()} to {label}", address, protocol)
    for rule in outbound.exclude_uids[:_MOST_RANGES]:
        yield from _excluded_users(cast, rule)
    for probe in (
        cast.out("outbound from a socket that is bound to the interface", cast.port_out),
        cast.query("DNS from a socket that is bound to the interface", _server(cast)),
    ):
        yield Probe(probe.label, dataclasses.replace(probe.connection, device=probe.connection.interface))
    udp = cast.leaves(Protocol.UDP, cast.remote, cast.port_out)
    yield Probe(f"IPv{cast.family} outbound UDP", udp)
    if cast.family is Family.IPV6:
        yield cast.out("outbound to a link-local address", cast.port_out, to=PEER_LINK_LOCAL)
        for protocol, port in ((Protocol.TCP, cast.port_out), (Protocol.TCP, DNS_PORT), (Protocol.UDP, DNS_PORT)):
            beside = cast.leaves(protocol, _BESIDE_LINK_LOCAL, port)
            yield Probe(f"IPv6 {protocol.upper()} port {port} of {_BESIDE_LINK_LOCAL}, next to link-local ones", beside)


def _marked(cast: Cast) -> Iterator[Probe]:
    """Sockets with an excluded mark, and with marks that differ from it in one bit or in bits that do not count."""
    policy = cast.policy
    server = _server(cast)
    for number, excluded in enumerate(policy.outbound.exclude_marks[:_MOST_RANGES], 1):
        lowest = excluded.mask & -excluded.mask
        beyond = ~excluded.mask & MAX_MARK & ~ROUTE_MARK
        for mark in dict.fromkeys((excluded.value, excluded.value | beyond, excluded.value ^ lowest)):
            if mark & ROUTE_MARK:
                continue  # the routes of TPROXY would take it
            for probe in (
                cast.out("outbound", cast.port_out),
                cast.out("data plane to its own host's address", cast.port_in, uid=policy.proxy_uid, to=cast.own),
                *(cast.query(f"DNS over {protocol.upper()}", server, protocol) for protocol in Protocol),
            ):
                marked = dataclasses.replace(probe.connection, mark=mark)
                yield Probe(f"{probe.label} from a socket with the mark {mark:#x}", marked)
        if policy.splits_zones(cast.family) and cast.family in policy.families and not excluded.value & ROUTE_MARK:
            port = _REUSED_PORT - number  # NAT gives a query another one while an earlier query has its answer's
            for who, mark in (("a marked socket", excluded.value), ("an application", 0)):
                probe = cast.query(f"DNS by {who}, from a port the other uses", server)
                yield Probe(probe.label, dataclasses.replace(probe.connection, mark=mark, source_port=port))


def _server(cast: Cast) -> Address:
    """A name server elsewhere that is captured, where any is."""
    servers = (s.address for s in cast.policy.servers(cast.family) if cast.layout.locate(s.address) == PEER)
    return next(servers, cast.remote)


def _excluded_users(cast: Cast, rule: UidExclusion) -> Iterator[Probe]:
    """The users of an exclusion and their neighbours, to its ports and their neighbours."""
    protocol, ports, uids = rule.protocol, rule.ports, rule.uids
    port = DNS_PORT if protocol is Protocol.UDP and includes(ports, DNS_PORT) else ports[0].first
    server = next((s.address for s in cast.policy.servers(cast.family) if s.interface is None), cast.remote)
    to = server if port == DNS_PORT else cast.remote
    for uid in sorted({uids.first, uids.last, max(0, uids.first - 1), min(MAX_UID, uids.last + 1)}):
        connection = cast.leaves(protocol, to, port, uid)
        what = "excluded uid" if uid in uids else "uid next to excluded ones"
        yield Probe(f"IPv{cast.family} {protocol} port {port} by the {what} {uid}", connection)
    if protocol is Protocol.TCP:
        yield cast.out(f"TCP port {port} by an application, not by the excluded uid {uids.first}", port)
        for edge in (*_edges(cast.policy, ports), cast.port_out):
            named = _named(ports, edge, "excluded")
            yield cast.out(f"TCP {named} by the excluded uid {uids.first}", edge, uid=uids.first)
        yield cast.query(f"DNS over TCP by the excluded uid {uids.first}", server, protocol, uid=uids.first)


def _to_self(cast: Cast) -> Iterator[Probe]:
    """Connections that never leave the host: the application's, and the data plane's, which cross the inbound side."""
    proxy, port = cast.policy.proxy_uid, cast.port_in
    passthrough = RESERVED[cast.family].passthrough.network_address
    yield cast.out("application to its own host's address", port, to=cast.own)
    if cast.port_out != port:
        yield cast.out(f"application to its own host's port {cast.port_out}", cast.port_out, to=cast.own)
    yield cast.out("application to the loopback address", port, to=cast.local)
    yield cast.out("data plane to its own host's address", port, uid=proxy, to=cast.own)
    yield cast.out("data plane to the loopback address", port, uid=proxy, to=cast.local)
    if cast.family is Family.IPV4:
        other = ip_address("127.0.0.2")
        yield cast.out("application to 127.0.0.2", port, to=other)
        yield cast.out("data plane to 127.0.0.2", port, uid=proxy, to=other)
        for beside in ("127.0.0.5", "127.0.0.7"):
            delivered = cast.out(f"data plane from {beside} to the application", port, uid=proxy, to=cast.own)
            yield Probe(delivered.label, dataclasses.replace(delivered.connection, source=ip_address(beside)))
    for uid in {max(0, proxy - 1), min(MAX_UID, proxy + 1)} - {proxy}:
        yield cast.out(
            f"uid {uid}, next to the data plane's, to its own host's address", cast.port_out, uid=uid, to=cast.own
        )
        yield cast.out(f"outbound by uid {uid}, next to the data plane's", cast.port_out, uid=uid)
    yield cast.query("data plane's DNS over TCP to its own host's address", cast.own, Protocol.TCP, uid=proxy)
    if cast.family in cast.policy.families:
        if cast.family is Family.IPV6:
            away = cast.out(f"application from {passthrough} to another host", cast.port_out).connection
            away = dataclasses.replace(away, source=passthrough)
            # Otherwise the answer does not find its way back: the other host has an address like that itself.
            if decide(cast.policy, away).action is Action.REDIRECT:
                yield Probe(f"IPv6 application from {passthrough} to another host", away)
        query = cast.query(f"application's DNS over TCP from {passthrough} to its own host", cast.own, Protocol.TCP)
        yield Probe(query.label, dataclasses.replace(query.connection, source=passthrough))
        delivered = cast.out(f"data plane from {passthrough} to the application", port, uid=proxy, to=cast.own)
        yield Probe(delivered.label, dataclasses.replace(delivered.connection, source=passthrough))
        if cast.policy.inbound.is_transparent:
            # Self-calls are redirected by rules of their own then, not by those that arrivals go through.
            for edge in _edges(cast.policy, cast.policy.inbound.include_ports or cast.policy.inbound.exclude_ports):
                yield cast.out(f"data plane to its own host's port {edge}", edge, uid=proxy, to=cast.own)
            for to in (cast.own, *((cast.local,) if can_answer_clients(cast.local) else ())):
                dialled = cast.out(f"data plane from a client's address to {to}", port, uid=proxy, to=to)
                source = dataclasses.replace(dialled.connection, source=cast.remote, local_source=False)
                yield Probe(dialled.label, source)
    for excluded in cast.policy.inbound.exclude_ports[:1]:
        if excluded.first not in data_plane_ports(cast.policy):
            label = f"data plane to its own host's excluded port {excluded.first}"
            yield cast.out(label, excluded.first, uid=proxy, to=cast.own)


def _dns(cast: Cast) -> Iterator[Probe]:
    policy = cast.policy
    links = {uplink.name for uplink in cast.layout.uplinks}
    mine = [server for server in policy.dns.servers if Family.of(server.address) is cast.family]
    servers = [server for server in mine if server.interface is None or server.interface in links]
    for server in servers[:_MOST_RANGES]:
        for label, protocol, uid in (
            (f"DNS to {server}", Protocol.UDP, None),
            (f"DNS over TCP to {server}", Protocol.TCP, None),
            (f"DNS to {server} by the data plane", Protocol.UDP, policy.proxy_uid),
            (f"DNS over TCP to {server} by the data plane", Protocol.TCP, policy.proxy_uid),
        ):
            yield _on(cast.query(label, server.address, protocol, uid=uid), server.interface)
        if server.interface is None:
            other = cast.leaves(Protocol.UDP, server.address, cast.port_out)
            yield Probe(f"IPv{cast.family} UDP port {cast.port_out} of the name server {server}", other)
        if server.interface is None and cast.layout.locate(server.address) == PEER:
            label = f"DNS from the name server {server} to this host"
            yield cast.arrive(label, DNS_PORT, source=server.address, protocol=Protocol.UDP)
    yield cast.query("DNS to another server", cast.remote)
    if cast.family is Family.IPV6:
        for protocol in Protocol:
            yield cast.query(f"DNS over {protocol.upper()} to a link-local server", PEER_LINK_LOCAL, protocol)
        label = "DNS to a link-local server by the data plane"
        yield cast.query(label, PEER_LINK_LOCAL, uid=policy.proxy_uid)
    yield cast.query("DNS over TCP to another server", cast.remote, Protocol.TCP)
    yield cast.query("DNS to another server by the data plane", cast.remote, uid=policy.proxy_uid)
    if policy.splits_zones(cast.family) and cast.family in policy.families:
        server_address = next((s.address for s in servers if s.interface is None), cast.remote)
        yield from _zones(cast, server_address)


def _on(probe: Probe, interface: str | None) -> Probe:
    if interface is None:
        return probe
    return Probe(probe.label, dataclasses.replace(probe.connection, interface=interface))


def _zones(cast: Cast, server: Address) -> Iterator[Probe]:
    """The same addresses and ports, by the data plane and by an application: neither may inherit the other's fate."""
    excluded = [
        rule.uids.first
        for rule in cast.policy.outbound.exclude_uids
        if rule.protocol is Protocol.UDP and includes(rule.ports, DNS_PORT)
    ]
    others = [("an excluded uid", uid) for uid in excluded[:1]]
    for who, uid in (("the data plane", cast.policy.proxy_uid), *others, ("an application", cast.app)):
        probe = cast.query(f"DNS by {who}, from a port the other uses", server, uid=uid)
        yield Probe(probe.label, dataclasses.replace(probe.connection, source_port=_REUSED_PORT))


def _other_groups(cast: Cast) -> Iterator[Probe]:
    """The same connections by processes outside the policy's control group, and in a group below it."""
    group = cast.policy.cgroup
    if group is None:
        return
    proxy = cast.policy.proxy_uid
    server = next((s.address for s in cast.policy.servers(cast.family) if s.interface is None), cast.remote)
    asked = [
        cast.out("outbound by an application", cast.port_out),
        cast.out("outbound by the data plane", cast.port_out, uid=proxy),
        cast.out("data plane to its own host's address", cast.port_in, uid=proxy, to=cast.own),
        *(cast.query(f"DNS over {protocol.upper()} to {server}", server, protocol) for protocol in Protocol),
        cast.query(f"DNS to {server} by the data plane", server, uid=proxy),
    ]
    if cast.policy.splits_zones(cast.family) and cast.family in cast.policy.families:
        for who, uid in (("the data plane", proxy), ("an application", cast.app)):
            asked.append(cast.query(f"DNS by {who}, from a port the other uses", server, uid=uid))
            reused = dataclasses.replace(asked[-1].connection, source_port=_REUSED_PORT)
            asked[-1] = Probe(asked[-1].label, reused)
    for where, path in (("outside", group.path.rpartition("/")[0]), ("below", f"{group.path}/{BELOW}")):
        for probe in asked:
            yield Probe(f"{probe.label}, {where} the cgroup", dataclasses.replace(probe.connection, cgroup=path))


def _bridges(cast: Cast) -> Iterator[Probe]:
    for bridge in cast.layout.bridges:
        network = bridge.network(cast.family)
        if network is not None:
            yield from _container(cast, bridge, network)
        if network is not None and cast.policy.excludes(bridge.name):
            yield from _departures(cast, bridge.name, member(network))


def _departures(cast: Cast, name: str, to: Address) -> Iterator[Probe]:
    """What leaves by an excluded interface."""
    yield cast.out(f"outbound by the excluded interface {name}", cast.port_out, to=to)
    for protocol in Protocol:
        yield cast.query(f"DNS over {protocol.upper()} by the excluded interface {name}", to, protocol)


def _container(cast: Cast, bridge: Bridge, network: Network) -> Iterator[Probe]:
    source, name = member(network), bridge.name
    yield cast.arrive(f"{name}: container to another host", cast.port_out, source=source, to=cast.remote)
    yield cast.arrive(f"{name}: container to the host's own address", cast.port_in, source=source)
    for port in (cast.port_in, SSH_PORT):
        yield cast.arrive(
            f"{name}: container to port {port} of the bridge's address", port, source=source, to=network[1]
        )
    yield cast.arrive(f"{name}: container's UDP", cast.port_out, source=source, to=cast.remote, protocol=Protocol.UDP)
    beyond = type(network.network_address)(min(int(network.broadcast_address) + 1, 2**network.max_prefixlen - 1))
    if cast.layout.locate(beyond) == PEER and not beyond.is_multicast:
        yield cast.arrive(
            f"{name}: container to the address after its network", cast.port_out, source=source, to=beyond
        )
    yield from _from_outside(cast, f"{name}: container's ", source)
    query = f"{name}: container's DNS"
    if cast.family is Family.IPV4:
        for protocol, to in itertools.product(Protocol, map(ip_address, ("127.0.0.1", "127.200.0.1"))):
            label = f"{query} over {protocol.upper()} to {to}"
            yield cast.arrive(label, DNS_PORT, source=source, to=to, protocol=protocol)
    servers = [s.address for s in cast.policy.servers(cast.family) if cast.layout.locate(s.address) == PEER]
    for server in (cast.remote, *servers[:1]):
        label = f"{query} to {server}"
        yield cast.arrive(label, DNS_PORT, source=source, to=server, protocol=Protocol.UDP)
    yield cast.arrive(f"{query} to the bridge's address", DNS_PORT, source=source, to=network[1], protocol=Protocol.UDP)
    for to, asked in (
        (cast.remote, ""),
        (network[1], " to the bridge's address"),
        (cast.own, " to the host's address"),
    ):
        yield cast.arrive(f"{query} over TCP{asked}", DNS_PORT, source=source, to=to)
    yield cast.arrive(f"another host to {name}'s container", cast.port_in, to=source)
    asked = f"another host's DNS to {name}'s container"
    yield cast.arrive(asked, DNS_PORT, to=source, protocol=Protocol.UDP)
