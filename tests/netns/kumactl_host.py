"""A host on which kumactl's rules, or tpctl's in their place, are asked with real connections."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.lab import APP, PROXY, PROXY_USER
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Bridge, Layout
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Policy

INSTALL = ("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables")
REMOTE = ip_address("203.0.113.7")
CONTAINERS = ip_network("172.31.0.0/24")
KUMA_RULES = """\
*nat
:KUMA_MESH_INBOUND - [0:0]
:KUMA_MESH_INBOUND_REDIRECT - [0:0]
:KUMA_MESH_OUTBOUND - [0:0]
:KUMA_MESH_OUTBOUND_REDIRECT - [0:0]
-A PREROUTING -p tcp -m comment --comment "kuma/mesh/transparent/proxy/x" -j KUMA_MESH_INBOUND
-I OUTPUT 1 -p udp --dport 53 -m owner --uid-owner 65534 -m comment --comment "kuma/mesh/transparent/proxy/y" -j RETURN
-A OUTPUT -p tcp -m comment --comment "kuma/mesh/transparent/proxy/z" -j KUMA_MESH_OUTBOUND
-A KUMA_MESH_INBOUND -p tcp -j KUMA_MESH_INBOUND_REDIRECT
-A KUMA_MESH_INBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A KUMA_MESH_OUTBOUND -m owner --uid-owner 65534 -j RETURN
-A KUMA_MESH_OUTBOUND -p tcp -j KUMA_MESH_OUTBOUND_REDIRECT
-A KUMA_MESH_OUTBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15001
COMMIT
"""
KUMA_RULES_WITHOUT_COMMENTS = re.sub(r'-m comment --comment "[^"]*" ', "", KUMA_RULES)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Our host, another host, and a container behind a bridge."""
    with Lab(Layout(bridges=(Bridge("docker0", (CONTAINERS,)),))) as made:
        yield made


def plane(lab: Lab) -> None:
    lab.serve_data_plane(Policy(PROXY))


def ask(lab: Lab, connection: Connection) -> str:
    lab.serve(connection)
    return str(lab.dial(connection))


def outbound(lab: Lab, destination: object, port: int, uid: int = APP, protocol: str = "tcp") -> Connection:
    return lab.layout.outgoing(protocol, ip_address(str(destination)), port, uid)


def stream(lab: Lab, client: str, server: str, address: object, port: int) -> tuple[socket.socket, socket.socket]:
    """A connection that stays open: the client's and the server's end."""
    with lab.inside(server):
        listening = socket.create_server(("0.0.0.0", port))
    with lab.inside(client, APP if client == HOST else 0):
        near = socket.create_connection((str(address), port), timeout=60)
    far, _ = listening.accept()
    listening.close()
    far.settimeout(60)
    return near, far


def echo_works(near: socket.socket, far: socket.socket) -> bool:
    near.sendall(b"ping")
    if far.recv(16) != b"ping":
        return False
    far.sendall(b"pong")
    return near.recv(16) == b"pong"
