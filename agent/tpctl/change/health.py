"""Whether what is redirected can arrive at the data plane: its sockets, the loopback interface, and its ports."""

from __future__ import annotations

from collections.abc import Iterator

from tpctl.change import loopback
from tpctl.change.listening import PortStatus, Seen, port_status
from tpctl.engines.landings import landings, ports
from tpctl.host import holders, interfaces, local_ports, port_users, routes, sockets
from tpctl.host.proc import in_first_namespace
from tpctl.host.sock_diag import LISTEN
from tpctl.spec.policy import PASSTHROUGH6, RESERVED, Family, Policy, PortRange, Protocol, WhenProxyDown


def port_statuses(policy: Policy, engine: str, registered: frozenset[int] | None = None) -> tuple[PortStatus, ...]:
    """Who listens on the data plane's ports, and whether that takes what the engine sends there.

    `registered` are the sockets that eBPF programs know, by cookie.
    """
    wanted = tuple(ports(policy))
    numbers = {port.number for port in wanted}
    protocols = dict.fromkeys(port.protocol for port in wanted)
    found = tuple(one for protocol in protocols for one in sockets.listeners(protocol) if one.port in numbers)
    seen = Seen(found, holders.processes(one.inode for one in found), registered)
    landing = tuple(landings(policy, engine, interfaces.addresses()))
    return tuple(port_status(port, landing, policy, seen) for port in wanted)


def loopback_problems(policy: Policy) -> Iterator[str]:
    """What keeps redirected connections from arriving at addresses of the loopback interface."""
    name = policy.loopback
    if not interfaces.is_up(name):
        yield (
            f"the interface {name} is down, and redirected connections of this host are lost: `ip link set {name} up`"
        )
        return
    for family in sorted(policy.families):
        here = RESERVED[family].local.network_address
        if policy.redirects_own(family) and not _is_delivered(here.packed):
            yield (
                f"{here} is not an address of {name}, and redirected IPv{family} connections of this host are lost: "
                f"`ip address add {here}/{8 if family is Family.IPV4 else 128} dev {name}`"
            )
    if Family.IPV6 in policy.families and policy.inbound.enabled and not loopback.present(name):
        yield (
            f"{PASSTHROUGH6} is not on {name}: the data plane cannot dial applications over IPv6 from it; "
            "`tpctl apply` adds it"
        )


def _is_delivered(packed: bytes) -> bool:
    try:
        route = routes.route_to(packed)
    except OSError:
        return True  # nobody can tell
    return route is not None and route.is_local


def port_warnings(policy: Policy) -> Iterator[str]:
    """Ports of the data plane that something else may get before it, or has already."""
    wanted = tuple(ports(policy))
    local = local_ports.local_ports()
    risked = local.at_risk(port.number for port in wanted)
    if risked:
        for_ever = "`tpctl persist --reserve-ports` reserves them, and " if in_first_namespace() else ""
        value = local_ports.listing(local_ports.merged(local.reserved, tuple(map(PortRange, risked))))
        yield (
            f"net.ipv4.ip_local_port_range ({local.given}) holds {_listed(risked)} of the data plane, and "
            "net.ipv4.ip_local_reserved_ports does not: a connection that goes out may get such a port, and then the "
            f"data plane cannot listen on it when it is started; {for_ever}"
            f"`sysctl -w net.ipv4.ip_local_reserved_ports={value}` keeps them free until the next boot"
        )
    tcp = tuple(port for port in wanted if port.protocol is Protocol.TCP)
    held = sockets.at_ports(Protocol.TCP, {port.number for port in tcp})
    for port in tcp:
        found = [one for one in held if one.local_port == port.number]
        if not any(one.state == LISTEN for one in found):
            yield from (f"{port} is taken: {who}" for who in port_users.in_words(found))


def _listed(numbers: tuple[int, ...]) -> str:
    return f"port{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def arrival_problems(policy: Policy, engine: str) -> tuple[str, ...]:
    """What keeps connections from arriving at the data plane, for a policy that has just been installed."""
    found = [*loopback_problems(policy)]
    if policy.when_proxy_down is not WhenProxyDown.BYPASS:
        found += [port.problem for port in port_statuses(policy, engine) if port.problem]
    return (*found, *port_warnings(policy))
