"""Which connections are aimed at the data plane itself, instead of being redirected to it (rule g1). Pure.

A data plane dials the original destination of what it accepts. A connection that was opened to one of its own ports has
that port as its original destination: Envoy dials itself until it has no descriptors left. And whoever may connect to
the outbound port uses it as a proxy.
"""

from __future__ import annotations

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
