"""Which connections are aimed at the data plane itself, instead of being redirected to it (rule g1). Pure.

A data plane dials the original destination of what it accepts. A connection that was opened to one of its own ports has
that port as its original destination: Envoy dials itself until it has no descriptors left. And whoever may connect to
the outbound port uses it as a proxy.
"""

from __future__ import annotations

from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.policy import DNS_PORT, Policy, Protocol


def guarded_ports(policy: Policy, protocol: str) -> tuple[int, ...]:
    """The data plane's ports of a protocol, in order; none where the policy does without the guard.

    A DNS listener on port 53 is not among them: a query to it looks like one that is redirected to it.
    """
    if not policy.guard_ports:
        return ()
    ports = {policy.dns.port}
    if protocol == Protocol.TCP:
        ports |= {policy.inbound.port, policy.outbound.port}
    elif protocol != Protocol.UDP:
        return ()
    return tuple(sorted(ports - {DNS_PORT}))


def is_aimed_at_data_plane(policy: Policy, connection: Connection) -> bool:
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
