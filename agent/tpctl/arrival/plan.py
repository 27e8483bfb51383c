"""Which probes a policy asks for: one of each direction, family and kind of redirection it has. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from tpctl.arrival.cable import Ends
from tpctl.arrival.model import Kind, Probe
from tpctl.rehearsal.choices import application_uid, redirected_ports
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import (
    DNS_PORT,
    Address,
    DnsCapture,
    Family,
    Policy,
    Ports,
    Protocol,
    includes,
)
from tpctl.spec.verdict import Action

_USUAL_PORTS = (443, 80)
"""Of outbound connections: what a firewall that lets any out is most likely to let out."""
_FIRST_PORT = 8443
"""Of connections from virtual networks, whose ports count for nothing; each has another, to be told apart."""
MOST_INCLUDED = 64
"""So many ports of an include list are looked at for one that nobody listens on."""


@dataclass(frozen=True, slots=True)
class Behind:
    """A place of ours in a virtual network."""

    interface: str
    """The bridge."""
    ends: Ends


@dataclass(frozen=True, slots=True)
class Scene:
    """What a probe can use on this host."""

    ends: Mapping[Family, Ends]
    interface: str
    """The cable's end on this host."""
    group: str | None
    """The control group of this process."""
    is_local: Callable[[Address], bool]
    """Whether an address is this host's own."""
    networks: tuple[Behind, ...] = ()
    ports: tuple[int, ...] = ()
    """Ports on this host for an inbound connection and a self-call, which are redirected and, if possible, free."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and what not."""

    probes: tuple[Probe, ...]
    skipped: tuple[str, ...]
    """What could not be probed, and why."""


def plan(policy: Policy, scene: Scene) -> Plan:
    """The probes of a policy on a host. What the policy redirects nothing of has no probe, and is not skipped."""
    probes: list[Probe] = []
    skipped: list[str] = []
    for family in sorted(policy.families & set(scene.ends)):
        for kind, connections in _wanted(policy, scene, family):
            found, why = _first_redirected(policy, connections)
            if found is None:
                skipped.append(f"{kind} over IPv{family}: {why}")
            else:
                probes.append(Probe(kind, found, decide(policy, found)))
    for number, behind in enumerate(scene.networks):
        for connection in _of_network(policy, scene, behind, number):
            verdict = decide(policy, connection)
            if verdict.action is Action.REDIRECT:
                probes.append(Probe(Kind.VIRTUAL_NETWORK, connection, verdict))
            else:
                what = f"{Kind.VIRTUAL_NETWORK} {behind.interface} over IPv{connection.family}"
                skipped.append(f"{what}: the policy leaves it alone: {verdict.reason} ({verdict.rule})")
    return Plan(tuple(probes), tuple(skipped))


def inbound_ports(policy: Policy) -> Iterator[int]:
    """Ports that an include list redirects where connections arrive; none where there is no such list."""
    ranges: Ports = policy.inbound.include_ports
    numbers = (number for item in ranges for number in range(item.first, item.last + 1))
    return (number for number, _ in zip(numbers, range(MOST_INCLUDED), strict=False))


def avoided(policy: Policy, address: Address) -> bool:
    """Whether the policy excludes connections from or to the address, so that another one serves better."""
    networks = (*policy.inbound.exclude_sources, *policy.outbound.exclude_destinations)
    return any(address in network for network in networks if network.version == address.version)


def _first_redirected(policy: Policy, connections: Iterable[Connection]) -> tuple[Connection | None, str]:
    """The first that the policy redirects; or, for the last that it does not, why."""
    why = "there is no address to send it to"
    for connection in connections:
        verdict = decide(policy, connection)
        if verdict.action is Action.REDIRECT:
            return connection, ""
        why = f"the policy leaves it alone: {verdict.reason} ({verdict.rule})"
    return None, why


def _wanted(policy: Policy, scene: Scene, family: Family) -> Iterator[tuple[Kind, list[Connection]]]:
    """The kinds that the policy has, each with connections of which the first that is redirected will do."""
    ends = scene.ends[family]
    app = application_uid(policy)

    def leaves(protocol: Protocol, to: Address, port: int, uid: int, interface: str = scene.interface) -> Connection:
        return Connection(Direction.OUTBOUND, protocol, ends.near, to, port, interface, uid=uid, cgroup=scene.group)

    if policy.outbound.enabled:
        ports = (*_USUAL_PORTS, redirected_ports(policy)[1])
        yield Kind.OUTBOUND, [leaves(Protocol.TCP, ends.far, port, app) for port in ports]
    if policy.inbound.enabled:
        arrives = Connection(Direction.INBOUND, Protocol.TCP, ends.far, ends.near, None, scene.interface)
        yield Kind.INBOUND, [dataclasses.replace(arrives, destination_port=port) for port in scene.ports[:1]]
        if policy.outbound.enabled and scene.ports:
            own = leaves(Protocol.TCP, ends.near, scene.ports[-1], policy.proxy_uid, policy.loopback)
            yield Kind.SELF_CALL, [own]
    if policy.captures_dns(family):
        servers = [ends.far] if policy.dns.capture is DnsCapture.ALL else [s.address for s in policy.servers(family)]
        for protocol in (Protocol.UDP, *((Protocol.TCP,) if policy.dns.tcp else ())):
            yield (
                Kind.DNS,
                [
                    leaves(protocol, to, DNS_PORT, app, policy.loopback if scene.is_local(to) else scene.interface)
                    for to in servers
                ],
            )


def _of_network(policy: Policy, scene: Scene, behind: Behind, number: int) -> Iterator[Connection]:
    """What a container sends: to somebody elsewhere, which is the cable's other end, and to the name server here."""
    near, far = behind.ends.near, behind.ends.far
    family = Family.of(near)
    if family in scene.ends:
        to = scene.ends[family].far
        yield Connection(
            Direction.INBOUND, Protocol.TCP, far, to, _FIRST_PORT + number, behind.interface, local_destination=False
        )
    for protocol in (Protocol.UDP, *((Protocol.TCP,) if policy.dns.tcp else ())):
        yield Connection(Direction.INBOUND, protocol, far, near, DNS_PORT, behind.interface)


def is_excluded_port(policy: Policy, port: int) -> bool:
    """Whether an inbound connection to the port is not redirected."""
    inbound = policy.inbound
    if inbound.include_ports:
        return not includes(inbound.include_ports, port)
    return includes(inbound.exclude_ports, port)
