"""The specification: what a policy does with a connection, and why.

`decide()` is pure. Every engine must agree with it on every connection (tests/equivalence compares them on real
sockets), and `tpctl explain` prints its trail. The rule names (i3, o5, z1, ...) are those of docs/ruleset.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.guard import guarded_ports
from tpctl.spec.policy import (
    DNS_PORT,
    RESERVED,
    BoundSockets,
    DnsCapture,
    Policy,
    Protocol,
    Redirection,
    WhenProxyDown,
    contains,
    includes,
    is_scoped,
    means_this_host,
)
from tpctl.spec.verdict import Action, Step, Verdict
from tpctl.spec.zones import CAPTURED_ZONE, DEFAULT_ZONE, UPSTREAM_ZONE


@dataclass(frozen=True, slots=True)
class _Outcome:
    action: Action
    port: int | None = None
    how: Redirection | None = None


_FROM_OUTSIDE = "a loopback address that another interface carries is left to the kernel, which drops it"
_AIMED = "it was opened to one of the data plane's own ports, to which connections only come redirected"


_PASS = _Outcome(Action.PASS)
_DROP = _Outcome(Action.DROP)
_RESET = _Outcome(Action.RESET)


def _redirect(port: int) -> _Outcome:
    return _Outcome(Action.REDIRECT, port, Redirection.REDIRECT)


_Ask = Callable[[str, str, bool], bool]
"""Records a rule and hands back whether it applied."""


def decide(policy: Policy, connection: Connection) -> Verdict:
    """What `policy` does with `connection`."""
    steps: list[Step] = []

    def ask(rule: str, text: str, applied: bool) -> bool:
        steps.append(Step(rule, text, applied))
        return applied

    outcome = _decide(policy, connection, ask)
    if outcome.action is Action.REDIRECT and policy.when_proxy_down is WhenProxyDown.BYPASS:
        text = "the data plane does not listen, and connections go straight on meanwhile"
        if ask("b1", text, not connection.data_plane_listens):
            outcome = _PASS
    if outcome.action is Action.REDIRECT and connection.is_bound(policy.loopback):
        text = f"the socket is bound to {connection.device}, from where the data plane cannot be reached"
        if ask("d1", text, not connection.device_leads_to_loopback):
            outcome = _DROP
    return Verdict(outcome.action, outcome.port, zone(policy, connection), tuple(steps), outcome.how)


def _decide(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    if ask("f1", f"IPv{connection.family} is not redirected by this policy", connection.family not in policy.families):
        return _PASS
    inbound = connection.direction is Direction.INBOUND
    excluded = policy.excludes(connection.interface)
    if inbound and policy.drop_invalid:
        text = "conntrack cannot place the packet, and invalid packets are dropped"
        if ask("i1", text, connection.state is State.INVALID and not excluded):
            return _DROP
    if ask("n1", "only a connection's first packet is decided", connection.state is not State.NEW):
        return _PASS
    # Before every exclusion: whom they spare does not have to reach the data plane.
    if policy.guard_ports and ask("g1", _AIMED, _is_aimed_at_data_plane(policy, connection)):
        return _RESET
    if policy.exclude_interfaces and ask("e1", f"the interface {connection.interface} is excluded", excluded):
        return _PASS
    marked = _has_excluded_mark(policy, connection)
    if (
        not inbound
        and policy.outbound.exclude_marks
        and ask("m1", f"the mark {connection.mark:#x} is excluded", marked)
    ):
        return _PASS
    if inbound and ask("l1", _FROM_OUTSIDE, _is_from_outside(policy, connection)):
        return _PASS
    if not inbound and ask("s1", "a link-local destination cannot be redirected", is_scoped(connection.destination)):
        return _PASS
    if policy.bound_sockets is BoundSockets.PASS:
        text = "the engine leaves sockets alone that are bound to an interface"
        if ask("d1", text, connection.is_bound(policy.loopback)):
            return _PASS
    if not inbound and policy.cgroup:
        outside = not policy.cgroup.holds(connection.cgroup)
        if ask("c1", f"only connections of the cgroup {policy.cgroup} are redirected", outside):
            return _PASS
    if connection.protocol == Protocol.TCP:
        return _inbound_tcp(policy, connection, ask) if inbound else _outbound_tcp(policy, connection, ask)
    if connection.protocol == Protocol.UDP:
        return _inbound_udp(policy, connection, ask) if inbound else _outbound_udp(policy, connection, ask)
    ask("p1", f"{connection.protocol} is never redirected", True)
    return _PASS


def _is_aimed_at_data_plane(policy: Policy, connection: Connection) -> bool:
    """Whether a new connection was opened to one of the data plane's ports on this host.

    Its user may do so over loopback, as health checks do.
    """
    if connection.state is not State.NEW:
        return False
    if connection.destination_port not in guarded_ports(policy, connection.protocol):
        return False
    over_loopback = connection.interface == policy.loopback
    if connection.direction is Direction.INBOUND:
        return connection.local_destination and not over_loopback
    return over_loopback and connection.uid != policy.proxy_uid


def _has_excluded_mark(policy: Policy, connection: Connection) -> bool:
    return any(connection.mark in excluded for excluded in policy.outbound.exclude_marks)


def _is_from_outside(policy: Policy, connection: Connection) -> bool:
    """Whether it arrives by another interface than loopback for an address that is only good on this host."""
    return connection.interface != policy.loopback and means_this_host(connection.destination)


def _inbound_tcp(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    for vnet in policy.networks(connection.family):
        carried = vnet.carries(connection.interface)
        if policy.dns.tcp:
            text = f"DNS over TCP from the virtual network {vnet}"
            if ask("v3", text, carried and connection.destination_port == DNS_PORT):
                return _redirect(policy.dns.port)
        text = f"leaves the virtual network {vnet}: outbound traffic of this host"
        if ask("i2", text, carried and connection.destination not in vnet.network):
            return _redirect(policy.outbound.port)
    if ask("i0", "the destination is not an address of this host: forwarded", not connection.local_destination):
        return _PASS
    arrived = _inbound_listener(policy, connection, ask)
    # TPROXY is for what comes from elsewhere: a self-call (o3) is redirected where it leaves.
    return replace(arrived, how=policy.inbound.mode) if arrived.action is Action.REDIRECT else arrived


def _inbound_listener(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    """Rules i3 to i7, which self-calls of the data plane go through as well."""
    inbound = policy.inbound
    if ask("i3", "inbound redirection is off", not inbound.enabled):
        return _PASS
    if ask("i4", "the source is excluded", contains(inbound.exclude_sources, connection.source)):
        return _PASS
    if inbound.include_ports:
        if ask("i5", "the port is included", includes(inbound.include_ports, connection.destination_port)):
            return _redirect(inbound.port)
        ask("i5", "only included ports are redirected", True)
        return _PASS
    if ask("i6", "the port is excluded", includes(inbound.exclude_ports, connection.destination_port)):
        return _PASS
    ask("i7", "everything else that arrives goes to the inbound listener", True)
    return _redirect(inbound.port)


def _inbound_udp(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    for vnet in policy.networks(connection.family):
        mine = vnet.carries(connection.interface) and connection.destination_port == DNS_PORT
        if ask("v1", f"a DNS query from the virtual network {vnet}", mine):
            return _redirect(policy.dns.port)
    ask("p2", "UDP that arrives is not redirected", True)
    return _PASS


def _excluded_uid(policy: Policy, connection: Connection) -> bool:
    return any(
        rule.protocol == connection.protocol
        and includes(rule.ports, connection.destination_port)
        and connection.uid in rule.uids
        for rule in policy.outbound.exclude_uids
    )


def _captured_query(policy: Policy, connection: Connection) -> bool:
    """Whether the connection is a query (over UDP or TCP) to a server whose queries are captured."""
    if connection.destination_port != DNS_PORT or is_scoped(connection.destination):
        return False
    if policy.dns.capture is DnsCapture.LISTED:
        return any(connection.destination == server.address for server in policy.servers(connection.family))
    return policy.dns.capture is DnsCapture.ALL


def _outbound_udp(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    if ask("d0", "UDP other than captured DNS is not redirected", not _captured_query(policy, connection)):
        return _PASS
    if _excluded(policy, connection, ask):
        return _PASS
    if ask("d2", "the data plane asks its own name server", connection.uid == policy.proxy_uid):
        return _PASS
    ask("d3", "a DNS query to a captured server", True)
    return _redirect(policy.dns.port)


def _excluded(policy: Policy, connection: Connection, ask: _Ask) -> bool:
    if ask("x1", "the owner's connections to this port are excluded", _excluded_uid(policy, connection)):
        return True
    destinations = policy.outbound.exclude_destinations
    return ask("x2", "the destination is excluded", contains(destinations, connection.destination))


def _outbound_tcp(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    outbound = policy.outbound
    port = connection.destination_port
    from_proxy = connection.uid == policy.proxy_uid
    if _excluded(policy, connection, ask):
        return _PASS
    if policy.captures_dns(connection.family):
        if policy.dns.tcp:
            captured = _captured_query(policy, connection) and not from_proxy
            if ask("d4", "DNS over TCP to a captured server", captured):
                return _redirect(policy.dns.port)
        if ask("x4", "DNS over TCP passes, the DNS listener serves UDP", port == DNS_PORT and not from_proxy):
            return _PASS
    if ask("o0", "outbound redirection is off", not outbound.enabled):
        return _PASS
    excluded = not outbound.include_ports and includes(outbound.exclude_ports, port)
    if ask("o1", "the port is excluded", excluded):
        return _PASS
    return _outbound_by_owner(policy, connection, ask)


def _outbound_by_owner(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    """Rules o2 to o7. Their order matters: o2 and t1 before o3, or the data plane could not reach the application."""
    outbound = policy.outbound
    reserved = RESERVED[connection.family]
    from_proxy = connection.uid == policy.proxy_uid
    over_loopback = connection.interface == policy.loopback
    to_local = connection.destination in reserved.local
    passthrough = over_loopback and connection.source in reserved.passthrough
    if ask("o2", f"the data plane reaches the application from {reserved.passthrough.network_address}", passthrough):
        return _PASS
    if policy.inbound.is_transparent:
        from_client = over_loopback and from_proxy and not connection.local_source
        if ask("t1", "the data plane reaches the application from the client's own address", from_client):
            return _PASS
    text = "the data plane calls this host's own address, so it must cross the inbound listener"
    if ask("o3", text, over_loopback and not to_local and from_proxy):
        arrived = _inbound_listener(policy, connection, ask)
        if arrived.action is Action.REDIRECT:
            return arrived
    if ask("o4", "applications that talk to this host itself stay direct", over_loopback and not from_proxy):
        return _PASS
    if ask("o5", "the data plane's own connection", from_proxy):
        return _PASS
    if ask("o6", f"the destination is {reserved.local.network_address}", to_local):
        return _PASS
    if outbound.include_ports:
        if ask("o7", "the port is included", includes(outbound.include_ports, connection.destination_port)):
            return _redirect(outbound.port)
        ask("o7", "only included ports are redirected", True)
        return _PASS
    ask("o7", "everything else that leaves goes to the outbound listener", True)
    return _redirect(outbound.port)


def zone(policy: Policy, connection: Connection) -> int:
    """The conntrack zone of a packet.

    NAT of UDP is a property of the conntrack entry. Without zones an application's query that reuses the addresses and
    ports of a recent query of the data plane would match that entry and bypass the redirection. Both directions of a
    flow must be in one zone, so whatever leaves for a captured server is in `UPSTREAM_ZONE`, as its answer will be.
    """
    family = connection.family
    if connection.protocol != Protocol.UDP or family not in policy.families or not policy.splits_zones(family):
        return DEFAULT_ZONE
    if connection.direction is Direction.OUTBOUND:
        return _outbound_zone(policy, connection)
    return _inbound_zone(policy, connection)


def _outbound_zone(policy: Policy, connection: Connection) -> int:
    if _captured_query(policy, connection):
        outside = policy.cgroup is not None and not policy.cgroup.holds(connection.cgroup)
        excluded = (
            policy.excludes(connection.interface)
            or _has_excluded_mark(policy, connection)
            or outside
            or _excluded_uid(policy, connection)
            or contains(policy.outbound.exclude_destinations, connection.destination)
        )
        upstream = connection.uid == policy.proxy_uid or excluded
        return UPSTREAM_ZONE if upstream else CAPTURED_ZONE  # z1, z5; z3
    if connection.source_port == policy.dns.port and connection.uid == policy.proxy_uid:
        return CAPTURED_ZONE  # z2: the data plane answers an application
    if connection.destination_port == policy.dns.port != DNS_PORT and connection.interface == policy.loopback:
        return CAPTURED_ZONE  # z8: a query that is sent to the DNS listener itself; its answer is of z2
    if policy.dns.capture is DnsCapture.LISTED and connection.destination in RESERVED[connection.family].local:
        resolvers = (server.address for server in policy.servers(connection.family) if server.address.is_loopback)
        if connection.source in resolvers:
            return UPSTREAM_ZONE  # z3: a local resolver answers the data plane
    return DEFAULT_ZONE


def _inbound_zone(policy: Policy, connection: Connection) -> int:
    if _is_from_outside(policy, connection):
        return DEFAULT_ZONE  # l1
    if connection.destination_port == DNS_PORT:
        carried = any(vnet.carries(connection.interface) for vnet in policy.networks(connection.family))
        if carried and not policy.excludes(connection.interface):
            return CAPTURED_ZONE  # z6
        if not connection.local_destination and _captured_query(policy, connection):
            return UPSTREAM_ZONE  # z7: forwarded for another host; its answer comes back by z4
    if connection.source_port == DNS_PORT:
        if policy.dns.capture is DnsCapture.ALL:
            return DEFAULT_ZONE if is_scoped(connection.source) else UPSTREAM_ZONE  # z4
        if any(connection.source == server.address for server in policy.servers(connection.family)):
            return UPSTREAM_ZONE  # z4
    return DEFAULT_ZONE
