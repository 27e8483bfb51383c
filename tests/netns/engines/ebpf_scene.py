"""A host with the eBPF engine in a scratch namespace and a control group of its own."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from tpctl.change import loopback
from tpctl.engines.ebpf.engine import EbpfEngine
from tpctl.engines.ebpf.plan import EbpfPlan
from tpctl.rehearsal.cgroup import OwnPlace
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, stage
from tpctl.spec.connection import Connection
from tpctl.spec.policy import (
    Dns,
    DnsCapture,
    Family,
    Inbound,
    Policy,
    PortRange,
    Protocol,
)

PROXY, APP = 5678, 1000
PLAIN = Policy(PROXY, inbound=Inbound(exclude_ports=(PortRange(22),)), dns=Dns(DnsCapture.ALL))
REMOTE = {Family.IPV4: ip_address("203.0.113.10"), Family.IPV6: ip_address("2001:db8:10::10")}
SERVER = "198.51.100.53"
ABORT = struct.pack("ii", 1, 0)
SO_ORIGINAL_DST = 80
FAMILIES = list(Family)
PATIENCE_SECONDS = 60.0


@dataclass
class Scene:
    """A laboratory with the engine ready in its host."""

    place: OwnPlace
    lab: Lab
    engine: EbpfEngine

    def apply(self, policy: Policy) -> EbpfPlan:
        with self.lab.inside(HOST):
            plan = self.engine.plan(policy)
            self.engine.apply(plan)
            return plan

    def remove(self) -> tuple[str, ...]:
        with self.lab.inside(HOST):
            return self.engine.remove().removed

    def who(self, connection: Connection) -> str:
        self.lab.serve(connection)
        return str(self.lab.dial(connection))

    def outgoing(self, family: Family, port: int = 8080, uid: int = APP) -> str:
        return self.who(self.lab.layout.outgoing(Protocol.TCP, REMOTE[family], port, uid))

    def arriving(self, family: Family, port: int = 8080) -> str:
        return self.who(self.lab.layout.arriving(REMOTE[family], HOST_ADDRESS[family], Protocol.TCP, port))

    def figures(self) -> dict[str, int]:
        with self.lab.inside(HOST):
            return {figure.name: figure.value for figure in self.engine.inspect(None).figures}


@contextlib.contextmanager
def laboratory(place: OwnPlace) -> Iterator[Scene]:
    with Lab(stage(PLAIN).layout) as lab:
        with lab.inside(HOST):
            loopback.add("lo")
            engine = place.engine()
            assert isinstance(engine, EbpfEngine)
        yield Scene(place, lab, engine)


def listening(address: str, port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((address, port))
    made.listen(64)
    made.settimeout(PATIENCE_SECONDS)
    return made


def connected(scene: Scene, node: str, address: str, port: int = 8080, *, v6_socket: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address or v6_socket else socket.AF_INET
    with scene.lab.inside(node, APP if node == HOST else 0):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.settimeout(PATIENCE_SECONDS)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        made.connect((f"::ffff:{address}" if v6_socket else address, port))
        return made
