"""Connections that an engine, or the specification, once got wrong, or that only just come out right.

A disagreement that `make test-equivalence` prints is pasted here as one more pair, with what it was about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.equivalence.engines import DOORS
from tests.equivalence.harness import Bench, relocated
from tests.equivalence.policies import SERVICE
from tpctl.rehearsal.cast import Probe
from tpctl.rehearsal.cgroup import BELOW
from tpctl.spec.connection import Connection, Direction, State
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import (
    ALL_PORTS,
    MAX_UID,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Redirection,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup")]

_BRIDGE = (VirtualNetwork("br+", ip_network("172.30.0.0/16")), VirtualNetwork("br+", ip_network("fd01::/64")))
_LISTED = Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("10.0.0.53")), NameServer(ip_address("127.0.0.53"))))
_OWN_PORTS = Policy(
    proxy_uid=5678,
    outbound=Outbound(
        exclude_uids=(
            UidExclusion(Protocol.TCP, (PortRange(8080, 8090),), UidRange(65537)),
            UidExclusion(Protocol.TCP, (PortRange(9443),), UidRange(256, 258)),
            UidExclusion(Protocol.TCP, (PortRange(22), PortRange(3306)), UidRange(0)),
        )
    ),
)


def _leaves(
    protocol: Protocol, source: str, destination: str, port: int, uid: int, interface: str = "eth0",
    *, cgroup: str | None = None, own: bool = True,
) -> Connection:  # fmt: skip
    return Connection(
        Direction.OUTBOUND, protocol, ip_address(source), ip_address(destination), port, interface, uid=uid,
        cgroup=cgroup, local_source=own,
    )  # fmt: skip


def _arrives(
    protocol: Protocol, source: str, destination: str, port: int, interface: str = "eth0", *, local: bool = True,
    state: State = State.NEW,
) -> Connection:  # fmt: skip
    return Connection(
        Direction.INBOUND, protocol, ip_address(source), ip_address(destination), port, interface,
        local_destination=local, state=state,
    )  # fmt: skip


_MANY_PORTS = tuple(PortRange(port, port + 1) for port in range(2000, 2100, 4))
_HOST4, _HOST6, _PEER4 = "198.19.255.2", "fd74:7063:746c::2", "198.19.255.1"

PINNED: dict[str, tuple[Policy, Connection]] = {
    "an interface whose letters have the last bits of another one's, in IPv6": (
        Policy(proxy_uid=5678, exclude_interfaces=(Interfaces("eth+"),)),
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", 8080, 1000, "uplink0"),
    ),
    "arrives by such an interface": (
        Policy(proxy_uid=5678, exclude_interfaces=(Interfaces("eth+"),)),
        _arrives(Protocol.TCP, "2001:db8:10::10", _HOST6, 8080, "uplink0"),
    ),
    "the query of a marked socket leaves in the zone of its answer": (
        Policy(proxy_uid=5678, outbound=Outbound(exclude_marks=(Mark(0x80000, 0xFF0000),)), dns=_LISTED),
        replace(_leaves(Protocol.UDP, _HOST4, "10.0.0.53", 53, 1000), mark=0x8ABCD),
    ),
    "a bridge that is excluded from a virtual network": (
        Policy(proxy_uid=5678, exclude_interfaces=(Interfaces("br0"),), dns=_LISTED, virtual_networks=_BRIDGE),
        _arrives(Protocol.UDP, "172.30.0.2", "10.0.0.53", 53, "br0", local=False),
    ),
    "a link-local name server is not captured: the kernel loses what is redirected": (
        Policy(
            proxy_uid=5678,
            dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("fe80::53"), "wan0"),)),
        ),
        _leaves(Protocol.UDP, "fe80::7063:2", "fe80::53", 53, 1000, "wan0"),
    ),
    "capture of everything spares link-local servers": (
        Policy(proxy_uid=5678, dns=Dns(DnsCapture.ALL)),
        _leaves(Protocol.UDP, "fe80::7063:2", "fe80::7063:1", 53, 1000),
    ),
    "link-local destinations pass": (
        Policy(proxy_uid=5678),
        _leaves(Protocol.TCP, "fe80::7063:2", "fe80::7063:1", 8080, 1000),
    ),
    "addresses beside the link-local ones do not": (
        Policy(proxy_uid=5678),
        _leaves(Protocol.TCP, _HOST6, "fec0::10", 8080, 1000),
    ),
    "insert mode: DNS over TCP passes all the same": (
        Policy(proxy_uid=5678, outbound=Outbound(insert=True), dns=_LISTED),
        _leaves(Protocol.TCP, _HOST4, "10.0.0.53", 53, 1000),
    ),
    "insert mode: DNS over TCP to a captured server": (
        Policy(proxy_uid=5678, outbound=Outbound(insert=True), dns=Dns(DnsCapture.ALL, tcp=True)),
        _leaves(Protocol.TCP, _HOST4, "10.0.0.53", 53, 1000),
    ),
    "the data plane calls its own host's address and meets the inbound listener": (
        Policy(proxy_uid=5678),
        _leaves(Protocol.TCP, _HOST4, _HOST4, 8080, 5678, "lo"),
    ),
    "self-calls of the data plane respect excluded inbound ports": (
        Policy(proxy_uid=5678, inbound=Inbound(exclude_ports=(PortRange(8080),))),
        _leaves(Protocol.TCP, _HOST6, _HOST6, 8080, 5678, "lo"),
    ),
    "self-calls of the data plane when inbound redirection is off": (
        Policy(proxy_uid=5678, inbound=Inbound(enabled=False)),
        _leaves(Protocol.TCP, _HOST4, _HOST4, 8080, 5678, "lo"),
    ),
    "the data plane reaches the application from 127.0.0.6": (
        Policy(proxy_uid=5678),
        _leaves(Protocol.TCP, "127.0.0.6", _HOST4, 8080, 5678, "lo"),
    ),
    "but not from 127.0.0.7": (
        Policy(proxy_uid=5678),
        _leaves(Protocol.TCP, "127.0.0.7", _HOST4, 8080, 5678, "lo"),
    ),
    "a container's DNS is answered although its query and the answer meet different hooks": (
        Policy(proxy_uid=5678, dns=_LISTED, virtual_networks=_BRIDGE),
        _arrives(Protocol.UDP, "172.30.0.2", "203.0.113.10", 53, "br0", local=False),
    ),
    "another host's query to a container is not a captured one, but has its zone": (
        Policy(proxy_uid=5678, dns=Dns(DnsCapture.ALL), virtual_networks=_BRIDGE),
        _arrives(Protocol.UDP, "203.0.113.10", "172.30.0.2", 53, local=False),
    ),
    "a container's DNS over TCP": (
        Policy(proxy_uid=5678, dns=Dns(DnsCapture.ALL, tcp=True), virtual_networks=_BRIDGE),
        _arrives(Protocol.TCP, "fd01::2", "2001:db8:10::10", 53, "br0", local=False),
    ),
    "forwarded connections are not taken": (
        Policy(proxy_uid=5678, virtual_networks=_BRIDGE),
        _arrives(Protocol.TCP, "203.0.113.10", "172.30.0.2", 8080, local=False),
    ),
    "the highest uid there is": (
        Policy(
            proxy_uid=5678,
            outbound=Outbound(exclude_uids=(UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(MAX_UID)),)),
        ),
        _leaves(Protocol.TCP, _HOST4, "203.0.113.10", 8080, MAX_UID),
    ),
    "a data plane with the highest uid": (
        Policy(proxy_uid=MAX_UID, dns=_LISTED),
        _leaves(Protocol.UDP, _HOST4, "10.0.0.53", 53, MAX_UID),
    ),
    "all users are excluded": (
        Policy(
            proxy_uid=5678,
            outbound=Outbound(exclude_uids=(UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(0, MAX_UID)),)),
        ),
        _leaves(Protocol.TCP, _HOST4, "203.0.113.10", 8080, 2**31 + 1),
    ),
    "more port ranges than one multiport match holds: the last": (
        Policy(proxy_uid=5678, outbound=Outbound(exclude_ports=_MANY_PORTS)),
        _leaves(Protocol.TCP, _HOST4, "203.0.113.10", _MANY_PORTS[-1].last, 1000),
    ),
    "more port ranges than one multiport match holds: the one after": (
        Policy(proxy_uid=5678, inbound=Inbound(include_ports=_MANY_PORTS)),
        _arrives(Protocol.TCP, _PEER4, _HOST4, _MANY_PORTS[-1].last + 1),
    ),
    "more port ranges of an excluded user than one multiport match holds": (
        Policy(
            proxy_uid=5678,
            outbound=Outbound(exclude_uids=(UidExclusion(Protocol.TCP, _MANY_PORTS, UidRange(1000, 1001)),)),
        ),
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", _MANY_PORTS[14].first, 1001),
    ),
    "users with ports of their own: one that is excluded, by a range of ports": (
        _OWN_PORTS,
        _leaves(Protocol.TCP, _HOST4, "203.0.113.10", 8085, 65537),
    ),
    "users with ports of their own: another one's port": (
        _OWN_PORTS,
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", 8085, 257),
    ),
    "users with ports of their own: the last of a range": (
        _OWN_PORTS,
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", 9443, 258),
    ),
    "users with ports of their own: the one after a range": (
        _OWN_PORTS,
        _leaves(Protocol.TCP, _HOST4, "203.0.113.10", 9443, 259),
    ),
    "capture of everything: the data plane's own query": (
        Policy(proxy_uid=5678, dns=Dns(DnsCapture.ALL)),
        _leaves(Protocol.UDP, _HOST4, "203.0.113.10", 53, 5678),
    ),
    "capture of everything: a query to a local resolver": (
        Policy(proxy_uid=5678, dns=Dns(DnsCapture.ALL)),
        _leaves(Protocol.UDP, "127.0.0.1", "127.0.0.53", 53, 1000, "lo"),
    ),
    "the data plane asks a local resolver, whose answer has its zone": (
        Policy(proxy_uid=5678, dns=_LISTED),
        _leaves(Protocol.UDP, "127.0.0.1", "127.0.0.53", 53, 5678, "lo"),
    ),
    "a query of an excluded user gets its answer through a stateful firewall": (
        Policy(
            proxy_uid=5678,
            outbound=Outbound(exclude_uids=(UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(4000)),)),
            dns=_LISTED,
        ),
        _leaves(Protocol.UDP, _HOST4, "10.0.0.53", 53, 4000),
    ),
    "a family that is not redirected": (
        Policy(proxy_uid=5678, families=frozenset({Family.IPV4}), dns=Dns(DnsCapture.ALL)),
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", 8080, 1000),
    ),
    "one service: what it asks goes to the data plane": (
        Policy(proxy_uid=5678, dns=_LISTED, cgroup=SERVICE),
        _leaves(Protocol.UDP, _HOST4, "10.0.0.53", 53, 1000, cgroup=SERVICE.path),
    ),
    "one service: what others ask gets its answer through a stateful firewall": (
        Policy(proxy_uid=5678, dns=_LISTED, cgroup=SERVICE),
        _leaves(Protocol.UDP, _HOST4, "10.0.0.53", 53, 1000),
    ),
    "one service: its workers, in a group below": (
        Policy(proxy_uid=5678, outbound=Outbound(insert=True), cgroup=SERVICE),
        _leaves(Protocol.TCP, _HOST6, "2001:db8:10::10", 8080, 1000, cgroup=f"{SERVICE.path}/{BELOW}"),
    ),
    "one service: a data plane outside of it does not cross the inbound listener": (
        Policy(proxy_uid=5678, cgroup=SERVICE),
        _leaves(Protocol.TCP, _HOST4, _HOST4, 8080, 5678, "lo"),
    ),
    "a connection that was there before, on a host whose conntrack was idle": (
        Policy(proxy_uid=5678),
        _arrives(Protocol.TCP, _PEER4, _HOST4, 8080, state=State.MIDSTREAM),
    ),
    "the end of a connection that never was, dropped": (
        Policy(proxy_uid=5678, drop_invalid=True),
        _arrives(Protocol.TCP, _PEER4, _HOST4, 8080, state=State.INVALID),
    ),
    "the end of a connection that never was, answered": (
        Policy(proxy_uid=5678),
        _arrives(Protocol.TCP, _PEER4, _HOST4, 8080, state=State.INVALID),
    ),
}

_TPROXY = Policy(proxy_uid=5678, inbound=Inbound(mode=Redirection.TPROXY))
_BEHIND_TPROXY = Policy(
    proxy_uid=5678,
    inbound=Inbound(mode=Redirection.TPROXY, insert=True),
    dns=Dns(DnsCapture.ALL, tcp=True),
    virtual_networks=_BRIDGE,
)
TRANSPARENT: dict[str, tuple[Policy, Connection]] = {
    "what arrives keeps its destination": (_TPROXY, _arrives(Protocol.TCP, _PEER4, _HOST4, 8080)),
    "so it does over IPv6": (_TPROXY, _arrives(Protocol.TCP, "2001:db8:10::10", _HOST6, 8080)),
    "the data plane's self-call is redirected all the same": (
        _TPROXY,
        _leaves(Protocol.TCP, _HOST4, _HOST4, 8080, 5678, "lo"),
    ),
    "what applications send over loopback arrives nowhere else": (
        _TPROXY,
        _leaves(Protocol.TCP, _HOST6, _HOST6, 8080, 1000, "lo"),
    ),
    "the application answers a client in whose name it was dialled": (
        _TPROXY,
        _leaves(Protocol.TCP, "203.0.113.10", _HOST4, 8080, 5678, "lo", own=False),
    ),
    "and over IPv6": (_TPROXY, _leaves(Protocol.TCP, "2001:db8:10::10", _HOST6, 8080, 5678, "lo", own=False)),
    "a container's call of another host is redirected": (
        _BEHIND_TPROXY,
        _arrives(Protocol.TCP, "172.30.0.2", "203.0.113.10", 8080, "br0", local=False),
    ),
    "a container's call of the host is outbound traffic": (
        _BEHIND_TPROXY,
        _arrives(Protocol.TCP, "172.30.0.2", _HOST4, 8080, "br0"),
    ),
    "a container's DNS over TCP to the host is redirected": (
        _BEHIND_TPROXY,
        _arrives(Protocol.TCP, "fd01::2", "fd01::1", 53, "br0"),
    ),
    "a connection that was there before goes on": (
        _TPROXY,
        _arrives(Protocol.TCP, _PEER4, _HOST4, 8080, state=State.MIDSTREAM),
    ),
}
"""Of `--inbound-mode tproxy`, which the eBPF engine refuses."""


@pytest.fixture(scope="module", params=sorted(DOORS))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with Bench(DOORS[request.param]) as made:
        yield made


@pytest.mark.parametrize("name", [*PINNED, *TRANSPARENT])
def test_pinned(bench: Bench, name: str) -> None:
    policy, connection = (PINNED | TRANSPARENT)[name]
    if name in TRANSPARENT and not bench.door.possible(policy).inbound.is_transparent:
        pytest.skip("this engine refuses it")
    staging = bench.stage(bench.door.possible(policy))
    connection = relocated(connection, policy.cgroup, staging.policy.cgroup)
    wrong = bench.try_all(staging.policy, staging.layout, [Probe(name, connection)])
    assert not wrong, str(wrong[0])
