"""The specification: what a policy does with a connection, and why.

`decide()` is pure. Every engine must agree with it on every connection (tests/equivalence compares them on real
sockets), and `tpctl explain` prints its trail. The rule names (i3, o5, z1, ...) are those of docs/ruleset.md.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.policy import (
    DNS_PORT,
    RESERVED,
    Address,
    DnsCapture,
    Family,
    Policy,
    Protocol,
    Redirection,
    WhenProxyDown,
    contains,
    includes,
    is_scoped,
)

DEFAULT_ZONE = 0
UPSTREAM_ZONE = 1
"""Queries that leave the host for a name server, and their answers."""
CAPTURED_ZONE = 2
"""Queries that are redirected to the data plane, and its answers."""


class Direction(enum.StrEnum):
    """Which hook sees the connection first."""

    INBOUND = "inbound"
    """It arrives on an interface, for this host or to be forwarded (PREROUTING)."""
    OUTBOUND = "outbound"
    """A process of this host opens it (OUTPUT)."""


class State(enum.StrEnum):
    """What conntrack knows of the packet."""

    NEW = "new"
    """The first packet: a TCP SYN, or the first datagram of a flow."""
    MIDSTREAM = "midstream"
    """A TCP segment that is no SYN, of a connection conntrack has not seen (it was opened before the install)."""
    ESTABLISHED = "established"
    """It belongs to a connection that was decided before."""
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection (or the first datagram of a flow) as the kernel's hooks see it."""

    direction: Direction
    protocol: str
    """"tcp", "udp", or any other IP protocol's name."""
    source: Address
    destination: Address
    destination_port: int | None
    interface: str
    """Where it arrives (inbound) or leaves (outbound)."""
    source_port: int | None = None
    uid: int | None = None
    """The fsuid of the process that created the socket; None when there is none (forwarded, sent by the kernel)."""
    cgroup: str | None = None
    """The control group in which the socket was created, from the root of the hierarchy and without a leading slash."""
    local_destination: bool = True
    """Inbound only: whether the destination is an address of this host."""
    local_source: bool = True
    """Outbound only: whether the source is an address of this host. It is not where the data plane dials the
    application from the client's own address (IP_TRANSPARENT)."""
    state: State = State.NEW
    data_plane_listens: bool = True
    """Whether anything listens on the port the connection would be redirected to."""

    @property
    def family(self) -> Family:
        """The IP family of the connection."""
        return Family.of(self.destination)


class Action(enum.StrEnum):
    """What happens to a connection."""

    PASS = "pass"  # noqa: S105 - a verdict, no password
    """tpctl changes nothing; rules of other software may still act."""
    REDIRECT = "redirect"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that was asked, and whether it applied."""

    rule: str
    text: str
    applied: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to a connection, and the rules that were asked, in order; the last that applied decided."""

    action: Action
    port: int | None
    """The data plane's port, when redirected."""
    zone: int
    """The conntrack zone of the packet."""
    steps: tuple[Step, ...]
    how: Redirection | None = None
    """By what, when redirected."""

    @property
    def reason(self) -> str:
        """The rule that decided, in words."""
        return self._decisive.text

    @property
    def rule(self) -> str:
        """The name of the rule that decided."""
        return self._decisive.rule

    @property
    def _decisive(self) -> Step:
        return next(step for step in reversed(self.steps) if step.applied)


@dataclass(frozen=True, slots=True)
class _Outcome:
    action: Action
    port: int | None = None
    how: Redirection | None = None


_PASS = _Outcome(Action.PASS)
_DROP = _Outcome(Action.DROP)


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
    return Verdict(outcome.action, outcome.port, zone(policy, connection), tuple(steps), outcome.how)


def _decide(policy: Policy, connection: Connection, ask: _Ask) -> _Outcome:
    if ask("f1", f"IPv{connection.family} is not redirected by this policy", connection.family not in policy.families):
        return _PASS
    inbound = connection.direction is Direction.INBOUND
    if inbound and policy.drop_invalid:
        text = "conntrack cannot place the packet, and invalid packets are dropped"
        if ask("i1", text, connection.state is State.INVALID):
            return _DROP
    if ask("n1", "only a connection's first packet is decided", connection.state is not State.NEW):
        return _PASS
    if not inbound and ask("s1", "a link-local destination cannot be redirected", is_scoped(connection.destination)):
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
            outside
            or _excluded_uid(policy, connection)
            or contains(policy.outbound.exclude_destinations, connection.destination)
        )
        upstream = connection.uid == policy.proxy_uid or excluded
        return UPSTREAM_ZONE if upstream else CAPTURED_ZONE  # z1, z5; z3
    if connection.source_port == policy.dns.port and connection.uid == policy.proxy_uid:
        return CAPTURED_ZONE  # z2: the data plane answers an application
    if policy.dns.capture is DnsCapture.LISTED and connection.destination in RESERVED[connection.family].local:
        resolvers = (server.address for server in policy.servers(connection.family) if server.address.is_loopback)
        if connection.source in resolvers:
            return UPSTREAM_ZONE  # z3: a local resolver answers the data plane
    return DEFAULT_ZONE


def _inbound_zone(policy: Policy, connection: Connection) -> int:
    if connection.destination_port == DNS_PORT:
        if any(vnet.carries(connection.interface) for vnet in policy.networks(connection.family)):
            return CAPTURED_ZONE  # z6
        if not connection.local_destination and _captured_query(policy, connection):
            return UPSTREAM_ZONE  # z7: forwarded for somebody else; its answer comes back by z4
    if connection.source_port == DNS_PORT:
        if policy.dns.capture is DnsCapture.ALL:
            return DEFAULT_ZONE if is_scoped(connection.source) else UPSTREAM_ZONE  # z4
        if any(connection.source == server.address for server in policy.servers(connection.family)):
            return UPSTREAM_ZONE  # z4
    return DEFAULT_ZONE
