"""What the tests of the specification ask with: policies, connections, and verdicts in short."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

import pytest

from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import (
    Cgroup,
    Dns,
    DnsCapture,
    NameServer,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)
from tpctl.spec.verdict import Action

PROXY, APP, ROOT = 5678, 1000, 0
PIN, POUT, PDNS = 15006, 15001, 15053
DEFAULT = Policy(PROXY)
OWN = {4: "192.0.2.2", 6: "fd00::2"}
REMOTE = {4: "198.51.100.7", 6: "fd01::7"}
LOCAL = {4: "127.0.0.1", 6: "::1"}
PASS_SOURCE = {4: "127.0.0.6", 6: "::6"}
SERVER = {4: "10.0.0.53", 6: "fd00::53"}
both_families = pytest.mark.parametrize("v", [4, 6])


def policy(**parts: object) -> Policy:
    """The default policy with other parts."""
    return dataclasses.replace(DEFAULT, **parts)  # type: ignore[arg-type]


def listed(*servers: str, **parts: object) -> Policy:
    """A policy that captures DNS to some servers, both families' by default."""
    parsed = []
    for text in servers or SERVER.values():
        address, _, scope = text.partition("%")
        parsed.append(NameServer(ip_address(address), scope or None))
    dns = Dns(DnsCapture.LISTED, servers=tuple(parsed))
    return policy(dns=dataclasses.replace(dns, **parts))  # type: ignore[arg-type]


def capture_all(**parts: object) -> Policy:
    """A policy that captures all DNS."""
    return policy(dns=dataclasses.replace(Dns(DnsCapture.ALL), **parts))  # type: ignore[arg-type]


def out(to: str, port: int | None = 80, uid: int | None = APP, **more: object) -> Connection:
    """A connection of this host; over lo when it goes to this host itself."""
    destination = ip_address(to)
    own = to in OWN.values() or destination.is_loopback
    base = Connection(
        Direction.OUTBOUND, "tcp", ip_address(OWN[destination.version]), destination, port, "lo" if own else "eth0",
        uid=uid,
    )  # fmt: skip
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def query(to: str, uid: int | None = APP, **more: object) -> Connection:
    """A DNS query over UDP."""
    return out(to, 53, uid, **{"protocol": "udp", "source_port": 40000, **more})


def arrives(to: str, port: int | None = 8080, source: str | None = None, **more: object) -> Connection:
    """A connection from another host."""
    destination = ip_address(to)
    base = Connection(
        Direction.INBOUND, "tcp", ip_address(source or REMOTE[destination.version]), destination, port, "eth0"
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def verdict(asked: Policy, connection: Connection) -> tuple[str, Action, int | None]:
    """The rule that decided, and what it did."""
    answer = decide(asked, connection)
    return answer.rule, answer.action, answer.port


def passes(rule: str) -> tuple[str, Action, int | None]:
    return rule, Action.PASS, None


def goes_to(port: int, rule: str) -> tuple[str, Action, int | None]:
    return rule, Action.REDIRECT, port


UPSTREAM, CAPTURED = 1, 2


def zone(asked: Policy, connection: Connection) -> int:
    return decide(asked, connection).zone


VNETS = (VirtualNetwork("docker0", ip_network("172.17.0.0/16")), VirtualNetwork("br+", ip_network("fd17::/64")))


SERVICE = Cgroup("system.slice/app.service", 7)


EXCLUDE_APP = (UidExclusion(Protocol.TCP, (PortRange(80, 90),), UidRange(1000, 1001)),)
