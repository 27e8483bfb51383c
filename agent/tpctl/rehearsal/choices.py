"""Users and ports that a policy treats like most others, so that the rule a probe is about makes the difference."""

from __future__ import annotations

from tpctl.spec.policy import DNS_PORT, Address, Policy, Ports, includes

_APPLICATION_UIDS = (1000, 1001, 1002, 4242, 61000)
_ORDINARY_PORTS = (8080, 9090, 3000, 4000, 7777, 31337)


def application_uid(policy: Policy) -> int:
    """An ordinary user that no exclusion of the policy names, if there is one."""
    ranges = [rule.uids for rule in policy.outbound.exclude_uids]
    free = (uid for uid in _APPLICATION_UIDS if uid != policy.proxy_uid and not any(uid in r for r in ranges))
    return next(free, 1000 if policy.proxy_uid != 1000 else 1001)


def redirected_ports(policy: Policy) -> tuple[int, int]:
    """A port that is redirected where connections arrive, and one where they leave, if the port lists allow any."""
    inbound, outbound = policy.inbound, policy.outbound
    return (
        _redirected_port(policy, inbound.include_ports, inbound.exclude_ports),
        _redirected_port(policy, outbound.include_ports, outbound.exclude_ports),
    )


def can_answer_clients(address: Address) -> bool:
    """Whether an application on this address of the host can answer clients elsewhere.

    The kernel routes nothing from 127.0.0.0/8 to them (route_localnet), not even what is then routed anew.
    """
    return not (address.version == 4 and address.is_loopback)


def data_plane_ports(policy: Policy) -> frozenset[int]:
    """The ports where the data plane itself listens."""
    return frozenset((policy.inbound.port, policy.outbound.port, policy.dns.port))


def _redirected_port(policy: Policy, include: Ports, exclude: Ports) -> int:
    """A port that the port lists redirect, if there is one, so that the other rules are seen to make the difference."""
    taken = data_plane_ports(policy) | {DNS_PORT}
    wanted = (item.first for item in include) if include else (p for p in _ORDINARY_PORTS if not includes(exclude, p))
    return next((port for port in wanted if port not in taken), _ORDINARY_PORTS[0])
